// Which items of a tile the rows of a block may choose: one bit an item, 32 items of a row in a word,
// rows across lanes. A register of logits is masked by one test of a register of words.
#pragma once

#include "problem.h"

namespace offtower::cpu {
namespace {

// Bits of up to kMaskItems items for a block.
constexpr int64_t kMaskItems = 96;

template <class A>
struct EligibleTile {
  static constexpr int L = kBlock<A>;
  static constexpr int64_t kWords = kMaskItems / 32;

  // Whether one of `count` items from `item` on is eligible in a row of the block.
  bool any_of(int64_t item, int64_t count) const {
    const uint64_t both = any[item / 32] | static_cast<uint64_t>(any[item / 32 + 1]) << 32;
    return (both >> (item % 32) & ((uint64_t{1} << count) - 1)) != 0;
  }
  const uint32_t* of(int64_t item) const { return words + item / 32 * L; }
  static uint32_t bit(int64_t item) { return 1u << (item % 32); }

  alignas(64) uint32_t words[kWords * L]; // [item / 32][lane]; 0 in lanes beyond the last row
  uint32_t any[kWords + 1] = {};          // over all lanes; one more for items at a word's end
};

// The eligible items of all rows. Tiles are loaded in rising order, so that each row's excluded items
// are read once: `cursor` holds the next one of each lane of a block.
template <class A>
class EligibleRows {
public:
  static constexpr int L = kBlock<A>;

  explicit EligibleRows(const PolicyOperands& operands) : o_(operands), e_(operands.eligible) {}

  // The position of a row's first excluded item at or after `item`.
  int64_t first_excluded(int64_t row, int64_t item) const {
    int64_t low = e_.excluded.offsets[row], high = e_.excluded.offsets[row + 1];
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (e_.excluded.items[middle] < item)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // Moves the cursors of a block to the first excluded item at or after `item`.
  void seek(int64_t block, int64_t item, int64_t* cursor) const {
    if (e_.excluded.offsets == nullptr) return;
    for (int64_t lane = 0; lane < lanes(block); ++lane)
      cursor[lane] = first_excluded(block * L + lane, item);
  }

  // Bits of the items [begin, begin + count); begin is a multiple of 32 and count at most kMaskItems.
  // Returns whether there is one.
  bool load(int64_t block, int64_t begin, int64_t count, int64_t* cursor,
            EligibleTile<A>& out) const {
    const int64_t used = lanes(block), words = ceil_div(count, 32);
    for (int64_t w = 0; w < words; ++w) {
      uint32_t* const to = out.words + w * L;
      if (e_.bitmap == nullptr) {
        for (int64_t lane = 0; lane < used; ++lane) to[lane] = ~uint32_t{0};
      } else {
        const int64_t at = begin / 32 + w;
        const uint64_t* const column = e_.bitmap + at / 2;
        const int32_t* const group = e_.group + block * L;
        for (int64_t lane = 0; lane < used; ++lane)
          to[lane] = static_cast<uint32_t>(column[group[lane] * e_.words] >> (at % 2 * 32));
      }
      for (int64_t lane = used; lane < L; ++lane) to[lane] = 0;
    }
    if (e_.excluded.offsets != nullptr) exclude(block, begin, count, cursor, out);
    uint32_t all = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t any = 0;
      for (int64_t lane = 0; lane < L; ++lane) any |= out.words[w * L + lane];
      out.any[w] = any;
      all |= any;
    }
    return all != 0;
  }

private:
  int64_t lanes(int64_t block) const { return min(L, o_.rows - block * L); }

  void exclude(int64_t block, int64_t begin, int64_t count, int64_t* cursor,
               EligibleTile<A>& out) const {
    for (int64_t lane = 0; lane < lanes(block); ++lane) {
      const int64_t end = e_.excluded.offsets[block * L + lane + 1];
      int64_t at = cursor[lane];
      for (; at < end && e_.excluded.items[at] < begin + count; ++at) {
        const int64_t item = e_.excluded.items[at] - begin;
        out.words[item / 32 * L + lane] &= ~EligibleTile<A>::bit(item);
      }
      cursor[lane] = at;
    }
  }

  const PolicyOperands& o_;
  const Eligibility& e_;
};

// -inf where an item is not eligible: M items from `item` of the tile on.
template <class A, int M>
OFFTOWER_INLINE void mask(const EligibleTile<A>& eligible, int64_t item, Registers<A, M>& s) {
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < A::kColumns; ++v)
      s[m][v] = A::where_having(eligible.of(item + m) + v * A::kWidth,
                                EligibleTile<A>::bit(item + m), s[m][v], A::set(-__builtin_inff()));
  }
}

} // namespace
} // namespace offtower::cpu
