// Backward: one pass that computes the logits again and both gradients from ds.
//
// A task is a segment of items with all rows. For each tile of items it computes ds of a group of
// rows, which stays in cache, and sums  dv_j += sum_i ds_ij u_i  and  du_i += sum_j ds_ij v_j.  Only
// this task writes its dv; the du of segments are added along a fixed tree. No atomics; the bits do
// not depend on the number of threads.
#pragma once

#include <cmath>

#include "../merge_tree.h"
#include "../rows_by_action.h"
#include "../workers.h"
#include "cotangent_tile.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kTileItems = 96; // a multiple of kGroup
constexpr int64_t kTileRows = 128; // a multiple of every block
constexpr int64_t kBackwardSegments = 64;

template <class A, class T, bool kMasked>
class Backward {
public:
  Backward(const BackwardOperands& operands, const BackwardResults& results, Workers& workers)
      : in_(operands), o_(operands.policy), out_(results), workers_(workers), problem_(o_),
        eligible_(o_), columns_(ceil_div(o_.dim, A::kWidth) * A::kWidth),
        panels_(ceil_div(o_.dim, kBlock<A>)), padded_rows_(problem_.blocks * kBlock<A>),
        cotangents_(padded_rows_), tiles_(ceil_div(o_.items, kTileItems)),
        segment_tiles_(ceil_div(tiles_, min(tiles_, kBackwardSegments))),
        segments_(ceil_div(tiles_, segment_tiles_)),
        tree_(segments_, out_.context == nullptr ? 0 : padded_rows_ * columns_),
        order_(in_.cotangents.log_prob == nullptr ? 0 : o_.rows) {
    if (out_.item != nullptr) {
      context_panels_.resize(ceil_div(padded_rows_, kTileRows) * panels_ * kRowPanel);
      for (int64_t row = 0; row < o_.rows; row += kTileRows)
        pack_panels<A, T>(static_cast<const T*>(o_.context) + row * o_.dim,
                          min(kTileRows, o_.rows - row), o_.dim, problem_.divisor,
                          kTileRows / A::kPair, context_panels(row));
    }
    fill_cotangents();
    if (in_.cotangents.log_prob != nullptr) sort_by_action(o_.action, o_.rows, order_.get());
    scratch_.fill(min(workers.threads(), segments_), *this);
  }

  bool run() {
    const auto task = [](void* self, int64_t segment, int worker) {
      static_cast<Backward*>(self)->segment(segment, worker);
    };
    if (!workers_.run(segments_, task, this)) return false;
    if (out_.context != nullptr) write_context();
    return true;
  }

private:
  static constexpr int64_t kRowPanel = kTileRows / A::kPair * kBlock<A>;

  struct Scratch {
    explicit Scratch(const Backward& owner)
        : tile(owner.problem_, kTileItems), cotangents(kTileItems, kTileRows),
          item_gradient(kTileItems * owner.columns_),
          item_panels(owner.out_.context == nullptr
                          ? 0
                          : kTileItems / A::kPair * kBlock<A> * owner.panels_),
          bias_sums(kTileItems * A::kWidth),
          dense(owner.o_.reward == RewardKind::dense ? kTileItems * kBlock<A> : 0),
          cursor(kMasked ? owner.padded_rows_ : 0) {}
    ItemTile<A, T> tile;
    CotangentTile<A> cotangents;
    Buffer<float> item_gradient;
    Buffer<typename A::Unit> item_panels;
    Buffer<float> bias_sums, dense;
    EligibleTile<A> eligible;
    Buffer<int64_t> cursor; // of all rows
  };

  void fill_cotangents() {
    const Cotangents& g = in_.cotangents;
    RowCotangents& c = cotangents_;
    c.has_reward = g.expected_reward != nullptr;
    c.has_entropy = g.entropy != nullptr;
    for (int64_t row = 0; row < padded_rows_; ++row) {
      if (row >= o_.rows) {
        c.reference_max[row] = INFINITY;
        continue;
      }
      const double total = in_.total[row];
      double base = 0.0;
      if (g.log_prob != nullptr) base -= g.log_prob[row];
      if (g.log_normalizer != nullptr) base += g.log_normalizer[row];
      if (c.has_entropy) base -= static_cast<double>(g.entropy[row]) * in_.entropy[row];
      c.reference_max[row] = in_.reference_max[row];
      c.base[row] = static_cast<float>(base / total);
      c.log_total[row] = static_cast<float>(std::log(total));
      if (c.has_reward) {
        c.reward[row] = static_cast<float>(g.expected_reward[row] / total);
        c.expected[row] = in_.expected_reward[row];
      }
      if (c.has_entropy) c.entropy[row] = static_cast<float>(g.entropy[row] / total);
    }
  }

  void segment(int64_t segment, int worker) {
    float* const sum = out_.context == nullptr ? nullptr : tree_.acquire();
    const int64_t end = min((segment + 1) * segment_tiles_, tiles_);
    for (int64_t block = 0; kMasked && block < problem_.blocks; ++block)
      eligible_.seek(block, segment * segment_tiles_ * kTileItems,
                     scratch_[worker].cursor.get() + block * kBlock<A>);
    for (int64_t t = segment * segment_tiles_; t < end; ++t) {
      if (workers_.stopped(worker)) return;
      const int64_t begin = t * kTileItems;
      tile(begin, min(kTileItems, o_.items - begin), scratch_[worker], sum);
    }
    if (sum != nullptr) tree_.add(segment, sum);
  }

  void tile(int64_t begin, int64_t count, Scratch& mine, float* context_gradient) {
    mine.tile.load(begin, count);
    if (out_.item != nullptr) clear(mine.item_gradient.get(), count * columns_);
    if (out_.item_bias != nullptr) clear(mine.bias_sums.get(), count * A::kWidth);
    if (out_.context != nullptr)
      pack_panels<A, T>(static_cast<const T*>(o_.item) + begin * o_.dim, count, o_.dim, 1.0f,
                        kTileItems / A::kPair, mine.item_panels.get());
    const int64_t registers = columns_ / A::kWidth, stride = mine.cotangents.row_stride();
    for (int64_t row = 0; row < padded_rows_; row += kTileRows) {
      const int64_t rows = min(kTileRows, padded_rows_ - row);
      bool any = false;
      for (int64_t r = 0; r < rows; r += kBlock<A>) any |= block((row + r) / kBlock<A>, r, mine);
      if (kMasked && !any) continue;
      const bool last = row + rows >= padded_rows_;
      if (out_.item != nullptr)
        accumulate<A, false>(mine.cotangents.by_row.get(), stride, context_panels(row),
                             kTileRows / A::kPair, rows / A::kPair, mine.item_gradient.get(),
                             columns_, count, registers,
                             last ? items(o_.item, begin + kTileItems, count) : Prefetched());
      if (out_.context != nullptr)
        accumulate<A, true>(mine.cotangents.for_items(), mine.cotangents.item_stride(),
                            mine.item_panels.get(), kTileItems / A::kPair,
                            ceil_div(count, A::kPair), context_gradient + row * columns_, columns_,
                            rows, registers, last ? items(out_.item, begin, rows) : Prefetched());
    }
    write_items(mine);
  }

  // Returns whether a row of the block has an eligible item in the tile.
  bool block(int64_t block, int64_t row_in_tile, Scratch& mine) {
    if (kMasked && !eligible_.load(block, mine.tile.begin, mine.tile.count,
                                   mine.cursor.get() + block * kBlock<A>, mine.eligible)) {
      mine.cotangents.clear(mine.tile.count, row_in_tile, kBlock<A>);
      return false;
    }
    float* bias = out_.item_bias == nullptr ? nullptr : mine.bias_sums.get();
    float* dense = mine.dense.get();
    const RowCotangents& g = cotangents_;
    CotangentTile<A>& out = mine.cotangents;
    if (g.has_reward && g.has_entropy)
      block_cotangents<A, T, true, true, kMasked>(problem_, g, mine.tile, block, row_in_tile, dense,
                                                  bias, mine.eligible, out);
    else if (g.has_reward)
      block_cotangents<A, T, true, false, kMasked>(problem_, g, mine.tile, block, row_in_tile,
                                                   dense, bias, mine.eligible, out);
    else if (g.has_entropy)
      block_cotangents<A, T, false, true, kMasked>(problem_, g, mine.tile, block, row_in_tile,
                                                   dense, bias, mine.eligible, out);
    else
      block_cotangents<A, T, false, false, kMasked>(problem_, g, mine.tile, block, row_in_tile,
                                                    dense, bias, mine.eligible, out);
    return true;
  }

  // A tile of items, or of their gradient, that a product for so many rows fetches.
  Prefetched items(const void* matrix, int64_t begin, int64_t product_rows) const {
    const int64_t count = min(kTileItems, o_.items - begin);
    if (matrix == nullptr || count <= 0) return {};
    return {static_cast<const T*>(matrix) + begin * o_.dim,
            count * o_.dim * static_cast<int64_t>(sizeof(T)), product_rows / kGroup * panels_};
  }

  // Of the rows from `row` on, a multiple of kTileRows.
  typename A::Unit* context_panels(int64_t row) {
    return context_panels_.get() + row / kTileRows * panels_ * kRowPanel;
  }

  // dv and db of a tile: the dense part from scratch, and the rows whose target is one of its items.
  void write_items(Scratch& mine) {
    const int64_t begin = mine.tile.begin, count = mine.tile.count;
    const T* context = static_cast<const T*>(o_.context);
    float* gradient = mine.item_gradient.get();
    float* bias = mine.bias_sums.get();
    if (out_.item_bias != nullptr)
      for (int64_t i = 0; i < count; ++i)
        for (int lane = 1; lane < A::kWidth; ++lane)
          bias[i * A::kWidth] += bias[i * A::kWidth + lane];
    if (in_.cotangents.log_prob != nullptr) {
      const int64_t* order = order_.get();
      for (int64_t at = first_row_of(o_.action, order, o_.rows, begin);
           at < o_.rows && o_.action[order[at]] < begin + count; ++at) {
        const int64_t row = order[at], item = o_.action[row] - begin;
        const float g = in_.cotangents.log_prob[row];
        if (out_.item_bias != nullptr) bias[item * A::kWidth] += g;
        if (out_.item == nullptr) continue;
        for (int64_t k = 0; k < o_.dim; ++k)
          gradient[item * columns_ + k] +=
              g * (to_float(context[row * o_.dim + k]) / problem_.divisor);
      }
    }
    T* to_bias = static_cast<T*>(out_.item_bias);
    if (to_bias != nullptr)
      for (int64_t i = 0; i < count; ++i) to_bias[begin + i] = from_float<T>(bias[i * A::kWidth]);
    if (out_.item == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      T* out = static_cast<T*>(out_.item) + (begin + i) * o_.dim;
      for (int64_t k = 0; k < o_.dim; ++k)
        out[k] = from_float<T>(gradient[i * columns_ + k] * problem_.scale);
    }
  }

  void write_context() {
    const T* item = static_cast<const T*>(o_.item);
    const float* g = in_.cotangents.log_prob;
    for (int64_t row = 0; row < o_.rows; ++row) {
      T* out = static_cast<T*>(out_.context) + row * o_.dim;
      const float* dense = tree_.sum() + row * columns_;
      const bool inside = g != nullptr && o_.action[row] >= 0;
      const T* target_item = inside ? item + o_.action[row] * o_.dim : nullptr;
      for (int64_t k = 0; k < o_.dim; ++k) {
        const float value = inside ? dense[k] + g[row] * to_float(target_item[k]) : dense[k];
        out[k] = from_float<T>(value / o_.temperature);
      }
    }
  }

  static void clear(float* p, int64_t count) {
    std::memset(p, 0, static_cast<size_t>(count) * sizeof(float));
  }

  const BackwardOperands in_;
  const PolicyOperands& o_;
  const BackwardResults out_;
  Workers& workers_;
  const Problem<A, T> problem_;
  const EligibleRows<A> eligible_;
  const int64_t columns_, panels_, padded_rows_;
  RowCotangents cotangents_;
  const int64_t tiles_, segment_tiles_, segments_;
  MergeTree tree_;
  Buffer<int64_t> order_;
  Buffer<typename A::Unit> context_panels_;
  Objects<Scratch> scratch_;
};

template <class A, class T>
bool backward(const BackwardOperands& operands, const BackwardResults& results, Workers& workers) {
  if (operands.policy.eligible.restricts())
    return Backward<A, T, true>(operands, results, workers).run();
  return Backward<A, T, false>(operands, results, workers).run();
}

} // namespace
} // namespace offtower::cpu
