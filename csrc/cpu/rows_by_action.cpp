#include "rows_by_action.h"

#include <algorithm>
#include <numeric>

namespace offtower::cpu {

void sort_by_action(const int64_t* action, int64_t rows, int64_t* order) {
  std::iota(order, order + rows, int64_t{0});
  std::stable_sort(order, order + rows,
                   [action](int64_t a, int64_t b) { return action[a] < action[b]; });
}

int64_t first_row_of(const int64_t* action, const int64_t* order, int64_t rows, int64_t item) {
  return std::lower_bound(order, order + rows, item,
                          [action](int64_t row, int64_t wanted) { return action[row] < wanted; }) -
         order;
}

} // namespace offtower::cpu
