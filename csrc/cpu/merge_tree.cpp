#include "merge_tree.h"

#include <algorithm>

namespace offtower::cpu {

MergeTree::MergeTree(int64_t leaves, int64_t length) : leaves_(leaves), length_(length) {}
MergeTree::~MergeTree() = default;

const float* MergeTree::sum() const { return root_; }

float* MergeTree::acquire() {
  float* array = nullptr;
  {
    const std::lock_guard<std::mutex> held(guard_);
    if (free_.empty()) {
      owned_.push_back(std::make_unique<float[]>(static_cast<size_t>(length_)));
      return owned_.back().get();
    }
    array = free_.back();
    free_.pop_back();
  }
  std::fill_n(array, length_, 0.0f);
  return array;
}

void MergeTree::add(int64_t leaf, float* array) {
  int64_t number = leaf, count = leaves_;
  for (int level = 0; count > 1; ++level, number /= 2, count = (count + 1) / 2) {
    const int64_t sibling = number ^ 1;
    if (sibling >= count) continue; // The last of an odd number has no sibling.
    float* other = nullptr;
    {
      const std::lock_guard<std::mutex> held(guard_);
      const auto found = waiting_.find({level, sibling});
      if (found == waiting_.end()) {
        waiting_.emplace(std::make_pair(level, number), array);
        return;
      }
      other = found->second;
      waiting_.erase(found);
    }
    for (int64_t i = 0; i < length_; ++i) array[i] += other[i];
    const std::lock_guard<std::mutex> held(guard_);
    free_.push_back(other);
  }
  root_ = array;
}

} // namespace offtower::cpu
