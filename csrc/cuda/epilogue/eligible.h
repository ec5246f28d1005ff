// Masks the scores of items that are not eligible: accumulators become -inf before any use of them.
#pragma once

#include "../mma/warp_gemm.h"

namespace offtower::cuda {

// Bit a % 64 of word a / 64 of row group_i of the bitmap says whether context i may choose item a.
struct EligibleParams {
  const int32_t* group;   // (contexts,)
  const uint64_t* bitmap; // (groups, words)
  int64_t words;

  // Of the 64 items from 64 * (item / 64) on, those from `item` on.
  OFFTOWER_DEVICE uint64_t items_from(int64_t context, int64_t item) const {
    return bitmap[group[context] * words + item / 64] >> (item % 64);
  }
};

// Contexts resident: a thread's rows are contexts, a tile of at most 64 items lies in one word.
template <int kMmaM, int kMmaN>
OFFTOWER_DEVICE void mask_items(const EligibleParams& p, int64_t row, int64_t contexts,
                                int64_t first, float (&y)[kMmaM][kMmaN][4]) {
  static_assert(64 % (kMmaN * 8) == 0, "a tile of items does not straddle words");
  const int g = lane_idx() / 4, t = lane_idx() % 4;
  OFFTOWER_UNROLL
  for (int r = 0; r < kMmaM * 2; ++r) {
    const int64_t context = row + r / 2 * kAtomM + r % 2 * 8 + g;
    const uint64_t word = context < contexts ? p.items_from(context, first) : 0;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int c = 0; c < 2; ++c)
        if ((word >> (n * 8 + 2 * t + c) & 1) == 0) y[r / 2][n][r % 2 * 2 + c] = -infinity();
    }
  }
}

// Items resident: the 16 items of a warp lie in one word of each streamed context.
template <int kMmaN>
OFFTOWER_DEVICE void mask_contexts(const EligibleParams& p, int64_t row, int64_t items,
                                   int64_t first, int64_t contexts, float (&y)[1][kMmaN][4]) {
  static_assert(64 % kAtomM == 0, "a warp's items do not straddle words");
  const int g = lane_idx() / 4, t = lane_idx() % 4;
  OFFTOWER_UNROLL
  for (int n = 0; n < kMmaN; ++n) {
    OFFTOWER_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int64_t context = first + n * 8 + 2 * t + c;
      const uint64_t word = context < contexts && row < items ? p.items_from(context, row) : 0;
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h)
        if ((word >> (h * 8 + g) & 1) == 0) y[0][n][h * 2 + c] = -infinity();
    }
  }
}

} // namespace offtower::cuda
