// Rows sorted by their logged item, for the sparse part of a gradient.
#pragma once

#include <cstdint>

namespace offtower::cpu {

// Fills `order` with the rows sorted by (item, row).
void sort_by_action(const int64_t* action, int64_t rows, int64_t* order);

// The first index in `order` whose row has `item` or a later one as its action.
int64_t first_row_of(const int64_t* action, const int64_t* order, int64_t rows, int64_t item);

} // namespace offtower::cpu
