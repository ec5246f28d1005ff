// ds = dL/ds of a tile of items for a group of rows, laid out for the two products that follow.
//
// ds_ij = exp(s_ij - anchor_i) (base_i + reward_i (q_ij - m_i) - entropy_i log pi_ij), where base,
// reward and entropy hold the row's cotangents over its total, and m the expected reward. The
// 1[j = a_i] part is sparse and added later.
//
// float32: one array [item][row] serves both products. bfloat16: by_row has neighboring rows in a
// unit (summed over rows for dv), by_item neighboring items (summed over items for du).
#pragma once

#include "eligible.h"

namespace offtower::cpu {
namespace {

// Per row, over all rows up to a whole block; rows beyond the last have exp(s - inf) = 0.
struct RowCotangents {
  explicit RowCotangents(int64_t rows)
      : reference_max(rows), base(rows), reward(rows), expected(rows), entropy(rows),
        log_total(rows) {}
  Buffer<float> reference_max, base, reward, expected, entropy, log_total;
  bool has_reward = false, has_entropy = false;
};

template <class A>
struct CotangentTile {
  using Unit = typename A::Unit;

  CotangentTile(int64_t items, int64_t tile_rows) : rows(tile_rows) {
    by_row.resize(items * row_stride());
    if (A::kPair == 2) by_item.resize(items / 2 * rows);
  }
  // Units from one item to the next, with padding: see pack_panels.
  int64_t row_stride() const { return rows / A::kPair + 64 / static_cast<int64_t>(sizeof(Unit)); }
  // Zeros for `lanes` rows of all items.
  void clear(int64_t items, int64_t row, int64_t lanes) {
    for (int64_t i = 0; i < items; ++i)
      for (int64_t k = 0; k < lanes / A::kPair; ++k)
        by_row[i * row_stride() + row / A::kPair + k] = 0;
    for (int64_t i = 0; A::kPair == 2 && i < items; i += 2)
      for (int64_t k = 0; k < lanes; ++k) by_item[i / 2 * rows + row + k] = 0;
  }
  // Of for_items: units from one item, or pair of items, to the next.
  int64_t item_stride() const { return A::kPair == 2 ? rows : row_stride(); }
  Unit* for_items() { return A::kPair == 2 ? by_item.get() : by_row.get(); }

  const int64_t rows;
  Buffer<Unit> by_row, by_item;
};

template <class A, int M>
OFFTOWER_INLINE void store_cotangents(const Registers<A, M>& ds, int64_t item, int64_t row,
                                      CotangentTile<A>& out) {
  constexpr int V = A::kColumns, W = A::kWidth;
  typename A::Unit* by_row = out.by_row.get() + item * out.row_stride() + row / A::kPair;
  if constexpr (A::kPair == 1) {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) A::store(by_row + m * out.row_stride() + v * W, ds[m][v]);
    }
  } else {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; v += 2)
        A::store_adjacent(by_row + m * out.row_stride() + v / 2 * W, ds[m][v], ds[m][v + 1]);
    }
    OFFTOWER_UNROLL
    for (int m = 0; m < M; m += 2) {
      typename A::Unit* pair = out.by_item.get() + (item + m) / 2 * out.rows + row;
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v)
        A::store_pairs(pair + v * W, ds[m][v],
                       m + 1 < M ? ds[m + 1 < M ? m + 1 : m][v] : A::set(0.0f));
    }
  }
}

template <class A, int M>
OFFTOWER_INLINE const Registers<A, M>& zeros(Registers<A, M>& s) {
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < A::kColumns; ++v) s[m][v] = A::set(0.0f);
  }
  return s;
}

template <class A, class T, int M, bool kReward, bool kEntropy, bool kMasked>
OFFTOWER_INLINE void item_cotangents(const Problem<A, T>& problem, const RowCotangents& g_rows,
                                     const ItemTile<A, T>& tile, int64_t item, int64_t block,
                                     int64_t row_in_tile, const float* dense, float* bias_sums,
                                     const EligibleTile<A>& eligible, CotangentTile<A>& out) {
  constexpr int V = A::kColumns, W = A::kWidth;
  const int64_t row = block * kBlock<A>;
  Registers<A, M> s;
  if (kMasked && !eligible.any_of(item, M)) {
    store_cotangents<A, M>(zeros<A, M>(s), item, row_in_tile, out);
    return;
  }
  const int64_t stride = tile.row_source.stride();
  affine<A, M>(tile.rows + item * stride, stride, tile.bias_at(item), problem.block(block),
               problem.depth, problem.scale, s);
  if constexpr (kMasked) mask<A, M>(eligible, item, s);
  alignas(64) float mass[kReward ? M * kBlock<A> : 1];
  OFFTOWER_UNROLL
  for (int v = 0; v < V; ++v) {
    const auto reference_max = A::load(g_rows.reference_max.get() + row + v * W);
    const auto base = A::load(g_rows.base.get() + row + v * W);
    constexpr int G = interleaved(M);
    OFFTOWER_UNROLL
    for (int m = 0; m < M; m += G) {
      typename A::F p[G];
      OFFTOWER_UNROLL
      for (int g = 0; g < G; ++g) p[g] = A::sub(s[m + g][v], reference_max);
      exponential<A, G>(p);
      OFFTOWER_UNROLL
      for (int g = 0; g < G; ++g) {
        if constexpr (kReward)
          A::store(mass + (m + g) * kBlock<A> + v * W,
                   A::mul(p[g], A::load(g_rows.reward.get() + row + v * W)));
        auto factor = base;
        if constexpr (kEntropy) {
          const auto y =
              A::max(A::set(kLogProbFloor), centered_log2<A>(s[m + g][v], reference_max));
          const auto log_pi =
              A::fms(y, A::set(kLn2), A::load(g_rows.log_total.get() + row + v * W));
          factor = A::sub(base, A::mul(A::load(g_rows.entropy.get() + row + v * W), log_pi));
        }
        s[m + g][v] = A::mul(p[g], factor);
      }
    }
  }
  if constexpr (kReward) {
    // Spill the sums: the reward product needs the registers.
    alignas(64) float so_far[M * kBlock<A>];
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) A::store(so_far + m * kBlock<A> + v * W, s[m][v]);
    }
    Registers<A, M> q;
    rewards<A, T, M>(problem, tile, item, problem.reward_block(block), dense, q);
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) {
      const auto expected = A::load(g_rows.expected.get() + row + v * W);
      OFFTOWER_UNROLL
      for (int m = 0; m < M; ++m) {
        const int64_t at = m * kBlock<A> + v * W;
        s[m][v] = A::fma(A::load(mass + at), A::sub(q[m][v], expected), A::load(so_far + at));
      }
    }
  }
  if (bias_sums != nullptr) {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      auto sum = A::load(bias_sums + (item + m) * W);
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) sum = A::add(sum, s[m][v]);
      A::store(bias_sums + (item + m) * W, sum);
    }
  }
  store_cotangents<A, M>(s, item, row_in_tile, out);
}

// ds of all items of the tile for one block of rows. `bias_sums` (items, kWidth), or null, collects
// its sum over rows.
template <class A, class T, bool kReward, bool kEntropy, bool kMasked>
void block_cotangents(const Problem<A, T>& problem, const RowCotangents& g,
                      const ItemTile<A, T>& tile, int64_t block, int64_t row_in_tile, float* dense,
                      float* bias_sums, const EligibleTile<A>& eligible, CotangentTile<A>& out) {
  const bool is_dense = kReward && !problem.factored;
  if (is_dense) load_dense<A, T>(problem.o, block, tile.begin, tile.count, dense);
  const auto at = [&](int64_t i) { return is_dense ? dense + i * kBlock<A> : nullptr; };
  int64_t i = 0;
  for (; i + kGroup <= tile.count; i += kGroup)
    item_cotangents<A, T, kGroup, kReward, kEntropy, kMasked>(
        problem, g, tile, i, block, row_in_tile, at(i), bias_sums, eligible, out);
  for (; i + 2 <= tile.count; i += 2)
    item_cotangents<A, T, 2, kReward, kEntropy, kMasked>(problem, g, tile, i, block, row_in_tile,
                                                         at(i), bias_sums, eligible, out);
  if (i < tile.count)
    item_cotangents<A, T, 1, kReward, kEntropy, kMasked>(problem, g, tile, i, block, row_in_tile,
                                                         at(i), bias_sums, eligible, out);
}

} // namespace
} // namespace offtower::cpu
