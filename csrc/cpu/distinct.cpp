#include "distinct.h"

#include <algorithm>
#include <vector>

namespace offtower::cpu {
namespace {

constexpr int64_t kPairwise = 32; // up to here comparisons of all pairs cost less than a sort

bool contains(const int64_t* item, int64_t count, int64_t wanted) {
  return std::find(item, item + count, wanted) != item + count;
}

} // namespace

int64_t keep_distinct(int64_t* item, float* log_prob, int64_t count) {
  int64_t kept = 0;
  const auto keep = [&](int64_t i) {
    item[kept] = item[i];
    log_prob[kept] = log_prob[i];
    ++kept;
  };
  if (count <= kPairwise) {
    for (int64_t i = 0; i < count; ++i)
      if (!contains(item, kept, item[i])) keep(i);
    return kept;
  }
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return item[a] != item[b] ? item[a] < item[b] : a < b; });
  std::vector<bool> repeated(static_cast<size_t>(count));
  for (size_t i = 1; i < order.size(); ++i)
    repeated[static_cast<size_t>(order[i])] = item[order[i]] == item[order[i - 1]];
  for (int64_t i = 0; i < count; ++i)
    if (!repeated[static_cast<size_t>(i)]) keep(i);
  return kept;
}

} // namespace offtower::cpu
