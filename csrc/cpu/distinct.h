// The first occurrences in a row of draws.
#pragma once

#include <cstdint>

namespace offtower::cpu {

// Moves the first occurrence of each item to the front, in order, with its log-probability. Returns
// how many there are.
int64_t keep_distinct(int64_t* item, float* log_prob, int64_t count);

} // namespace offtower::cpu
