// The k largest logits of each row, streaming over items: a register of scores is compared with the
// thresholds of its rows, and only scores above them are handled one by one.
#pragma once

#include <cmath>

#include "../top_k_buffer.h"
#include "../workers.h"
#include "eligible.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kTopKTile = 96;

template <class A, class T, bool kMasked>
class TopK {
public:
  TopK(const PolicyOperands& operands, const TopKResults& results, Workers& workers)
      : problem_(operands), eligible_(operands), out_(results), workers_(workers),
        tiles_(ceil_div(operands.items, kTopKTile)),
        // The order of candidates is total: splits may follow the threads and change no result.
        splits_(min(tiles_, ceil_div(workers.threads(), problem_.blocks))) {
    found_.fill(splits_ * problem_.blocks * kBlock<A>, out_.k);
    tile_.fill(min(workers.threads(), splits_ * problem_.blocks), problem_, kTopKTile);
  }

  bool run() {
    const auto task = [](void* self, int64_t index, int worker) {
      static_cast<TopK*>(self)->search(index, worker);
    };
    if (!workers_.run(splits_ * problem_.blocks, task, this)) return false;
    const auto write = [](void* self, int64_t block, int) {
      static_cast<TopK*>(self)->write(block);
    };
    return workers_.run(problem_.blocks, write, this);
  }

private:
  static constexpr int L = kBlock<A>;

  void search(int64_t index, int worker) {
    const int64_t split = index / problem_.blocks, block = index % problem_.blocks;
    alignas(64) float threshold[L];
    for (int lane = 0; lane < L; ++lane) {
      const bool row = block * L + lane < problem_.o.rows;
      threshold[lane] = row ? __builtin_nanf("") : __builtin_inff();
    }
    ItemTile<A, T>& tile = tile_[worker];
    EligibleTile<A> bits;
    int64_t cursor[L];
    if (kMasked) eligible_.seek(block, tiles_ * split / splits_ * kTopKTile, cursor);
    const int64_t end = tiles_ * (split + 1) / splits_;
    for (int64_t t = tiles_ * split / splits_; t < end; ++t) {
      if (workers_.stopped(worker)) return;
      const int64_t begin = t * kTopKTile;
      const int64_t count = min(kTopKTile, problem_.o.items - begin);
      if (kMasked && !eligible_.load(block, begin, count, cursor, bits)) continue;
      tile.load(begin, count);
      int64_t i = 0;
      for (; i + kGroup <= tile.count; i += kGroup) {
        if (kMasked && !bits.any_of(i, kGroup)) continue;
        compare<kGroup>(tile, i, block, index, threshold, bits);
      }
      for (; i < tile.count; ++i) compare<1>(tile, i, block, index, threshold, bits);
    }
  }

  template <int M>
  OFFTOWER_INLINE void compare(const ItemTile<A, T>& tile, int64_t item, int64_t block,
                               int64_t index, float* threshold, const EligibleTile<A>& bits) {
    Registers<A, M> s;
    const int64_t stride = tile.row_source.stride();
    affine<A, M>(tile.rows + item * stride, stride, tile.bias_at(item), problem_.block(block),
                 problem_.depth, problem_.scale, s);
    uint32_t any = 0;
    OFFTOWER_UNROLL
    for (int v = 0; v < A::kColumns; ++v) {
      const auto limit = A::load(threshold + v * A::kWidth);
      OFFTOWER_UNROLL
      for (int m = 0; m < M; ++m) {
        uint32_t lanes = A::not_below_or_equal(s[m][v], limit);
        if constexpr (kMasked)
          lanes &= A::having(bits.of(item + m) + v * A::kWidth, EligibleTile<A>::bit(item + m));
        any |= lanes;
      }
    }
    if (__builtin_expect(any == 0, 1)) return;
    alignas(64) float score[L];
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < A::kColumns; ++v) A::store(score + v * A::kWidth, s[m][v]);
      for (int lane = 0; lane < L; ++lane)
        if (!(score[lane] <= threshold[lane]) &&
            (!kMasked || (bits.of(item + m)[lane] & EligibleTile<A>::bit(item + m)) != 0))
          threshold[lane] = found_[index * L + lane].push(score[lane], tile.begin + item + m);
    }
  }

  void write(int64_t block) {
    for (int64_t lane = 0; lane < L && block * L + lane < problem_.o.rows; ++lane) {
      TopKBuffer& best = found_[block * L + lane];
      for (int64_t split = 1; split < splits_; ++split)
        best.merge(found_[(split * problem_.blocks + block) * L + lane]);
      const int64_t at = (block * L + lane) * out_.k;
      best.write(out_.score + at, out_.index + at);
      if (!kMasked) continue;
      for (int64_t i = best.found(); i < out_.k; ++i) {
        out_.score[at + i] = -INFINITY;
        out_.index[at + i] = -1;
      }
    }
  }

  const Problem<A, T> problem_;
  const EligibleRows<A> eligible_;
  const TopKResults out_;
  Workers& workers_;
  const int64_t tiles_, splits_;
  Objects<TopKBuffer> found_; // [split][block][lane]
  Objects<ItemTile<A, T>> tile_;
};

template <class A, class T>
bool top_k(const PolicyOperands& operands, const TopKResults& results, Workers& workers) {
  if (operands.eligible.restricts()) return TopK<A, T, true>(operands, results, workers).run();
  return TopK<A, T, false>(operands, results, workers).run();
}

} // namespace
} // namespace offtower::cpu
