// The k best (score, index) pairs of a row, collected from a stream of scores.
//
// Order: NaN first (as torch has it), then by falling score, then by rising index. It is total, so
// the result does not depend on how the items were split.
#pragma once

#include <cstdint>
#include <vector>

namespace offtower::cpu {

struct ScoredItem {
  float score;
  int64_t index;
};

class TopKBuffer {
public:
  explicit TopKBuffer(int64_t k);
  ~TopKBuffer();

  // Scores at or below the threshold need not be pushed; NaN means that all must be.
  // Returns the threshold after the push. Indices must rise from push to push.
  float push(float score, int64_t index);

  // Keeps the k best of these and the others, whose items all come later.
  void merge(const TopKBuffer& others);
  // How many there are: fewer than k where fewer were pushed.
  int64_t found() const { return static_cast<int64_t>(kept_.size()); }
  // Writes them in order.
  void write(float* score, int64_t* index);

private:
  void shrink();

  const int64_t k_;
  float threshold_ = __builtin_nanf("");
  std::vector<ScoredItem> kept_;
};

} // namespace offtower::cpu
