#include "top_k_buffer.h"

#include <algorithm>

namespace offtower::cpu {
namespace {

bool comes_before(const ScoredItem& a, const ScoredItem& b) {
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  if (a_nan || b_nan) return a_nan == b_nan ? a.index < b.index : a_nan;
  return a.score != b.score ? a.score > b.score : a.index < b.index;
}

} // namespace

TopKBuffer::TopKBuffer(int64_t k) : k_(k) {}
TopKBuffer::~TopKBuffer() = default;

float TopKBuffer::push(float score, int64_t index) {
  kept_.push_back({score, index});
  // Twice k and a few more: shrinking costs O(k) and happens once in k pushes.
  if (static_cast<int64_t>(kept_.size()) >= 2 * k_ + 64) shrink();
  return threshold_;
}

void TopKBuffer::merge(const TopKBuffer& others) {
  kept_.insert(kept_.end(), others.kept_.begin(), others.kept_.end());
  shrink();
}

void TopKBuffer::write(float* score, int64_t* index) {
  shrink();
  std::sort(kept_.begin(), kept_.end(), comes_before);
  for (const ScoredItem& candidate : kept_) {
    *score++ = candidate.score;
    *index++ = candidate.index;
  }
}

void TopKBuffer::shrink() {
  if (static_cast<int64_t>(kept_.size()) <= k_) return;
  const auto last = kept_.begin() + (k_ - 1);
  std::nth_element(kept_.begin(), last, kept_.end(), comes_before);
  threshold_ = last->score;
  kept_.erase(last + 1, kept_.end());
}

} // namespace offtower::cpu
