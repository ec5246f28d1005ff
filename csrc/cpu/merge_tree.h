// Sums partial arrays in a fixed order, whichever thread finishes first.
//
// Leaves 0..count-1 are added along a binary tree over their numbers, so the bits of the sum depend
// only on `count`. Leaves are started in order, so at most about threads + log2(count) arrays exist at
// a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace offtower::cpu {

class MergeTree {
public:
  MergeTree(int64_t leaves, int64_t length);
  ~MergeTree();

  // `length` zeros for a leaf; the tree owns them. Throws std::bad_alloc.
  float* acquire();
  // Adds a finished leaf and merges it with the siblings that are finished.
  void add(int64_t leaf, float* array);
  // The sum, after all leaves were added.
  const float* sum() const;

private:
  const int64_t leaves_, length_;
  std::mutex guard_;
  std::vector<std::unique_ptr<float[]>> owned_;
  std::vector<float*> free_;
  std::map<std::pair<int, int64_t>, float*> waiting_; // by (level, number)
  float* root_ = nullptr;
};

} // namespace offtower::cpu
