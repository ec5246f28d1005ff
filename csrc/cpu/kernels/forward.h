// Forward: per row log_prob, log_normalizer, expected_reward, action_reward and entropy, streaming
// over items.
//
// A task is a (segment of items) x (group of blocks). Within it (sum, reward, centered) of kFold items
// are float32 and then added to float64 sums, so errors do not grow with the number of items. Segments
// merge in their order; no result depends on the number of threads.
#pragma once

#include <cmath>

#include "../workers.h"
#include "eligible.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kFold = 96;             // items between two folds; a multiple of kGroup
constexpr int64_t kTileBytes = 192 << 10; // of items that stay in the second-level cache
constexpr int64_t kSegments = 64;         // at most, over the items
constexpr int64_t kSegmentFolds = 43;     // about: the merge of a shorter one costs over 1 %
constexpr int64_t kGroupRows = 256;       // that share a tile
template <class A>
constexpr int64_t kGroupBlocks = kGroupRows / kBlock<A>;
constexpr float kInitialMax = -1e38f; // before any item
// A logit may exceed the reference max by this much (see also kChecksSum): more would cost the
// entropy digits, less would move the reference too often.
constexpr float kReferenceMaxSlack = 1.0f;

// Sums of one row over a segment.
struct RowSums {
  double total, reward, centered; // centered in units of log 2
  float reference_max;
};

template <class A>
struct BlockSums {
  static constexpr int L = kBlock<A>;

  void clear() {
    for (int lane = 0; lane < L; ++lane) {
      reference_max[lane] = base[lane] = kInitialMax;
      limit[lane] = kInitialMax + kReferenceMaxSlack;
      sum[lane] = reward[lane] = centered[lane] = 0.0f;
      total64[lane] = reward64[lane] = centered64[lane] = 0.0;
    }
  }

  // Adds the float32 sums of the last items to the float64 ones, which are relative to `base`.
  template <bool kReward, bool kEntropy>
  void fold() {
    bool moved = false;
    for (int lane = 0; lane < L; ++lane) moved |= reference_max[lane] != base[lane];
    if (moved) rebase();
    for (int lane = 0; lane < L; ++lane) {
      total64[lane] += sum[lane];
      if (kReward) reward64[lane] += reward[lane];
      if (kEntropy) centered64[lane] += centered[lane];
      sum[lane] = reward[lane] = centered[lane] = 0.0f;
    }
  }

  void rebase() {
    for (int lane = 0; lane < L; ++lane) {
      if (reference_max[lane] == base[lane]) continue;
      const double shift = (static_cast<double>(base[lane]) - reference_max[lane]) * kLog2E;
      // Before the first item there is nothing to move, and the shift is -1e38.
      const double factor = total64[lane] == 0.0 ? 0.0 : std::exp2(shift);
      centered64[lane] =
          total64[lane] == 0.0 ? 0.0 : factor * (centered64[lane] + total64[lane] * shift);
      total64[lane] *= factor;
      reward64[lane] *= factor;
      base[lane] = reference_max[lane];
    }
  }

  alignas(64) float reference_max[L], limit[L];
  alignas(64) float sum[L], reward[L], centered[L];
  alignas(64) float base[L];
  alignas(64) double total64[L], reward64[L], centered64[L];
};

// Raises the reference max of lanes whose largest new logit exceeds it by more than the slack, and
// rescales the float32 sums. Rare after the first items of a segment.
template <class A>
OFFTOWER_INLINE void raise_reference_max(const typename A::F (&top)[A::kColumns],
                                         BlockSums<A>& sums) {
  for (int v = 0; v < A::kColumns; ++v) {
    const int64_t at = v * A::kWidth;
    const auto old = A::load(sums.reference_max + at), sum = A::load(sums.sum + at);
    const auto reference_max = A::where_above(top[v], A::load(sums.limit + at), top[v], old);
    const auto shift =
        centered_log2<A>(old, reference_max); // -1e38 before the first item, when sum is 0
    const auto factor = exponential<A>(A::sub(old, reference_max));
    const auto centered = A::fma(sum, shift, A::load(sums.centered + at));
    A::store(sums.reference_max + at, reference_max);
    A::store(sums.limit + at, A::add(reference_max, A::set(kReferenceMaxSlack)));
    A::store(sums.sum + at, A::mul(sum, factor));
    A::store(sums.reward + at, A::mul(A::load(sums.reward + at), factor));
    A::store(sums.centered + at, A::mul(centered, factor));
  }
}

template <class A, class T, int M>
OFFTOWER_INLINE void score(const Problem<A, T>& problem, const ItemTile<A, T>& tile, int64_t item,
                           int64_t block, Registers<A, M>& s) {
  const int64_t stride = tile.row_source.stride();
  affine<A, M>(tile.rows + item * stride, stride, tile.bias_at(item), problem.block(block),
               problem.depth, problem.scale, s);
}

template <class A, int M>
OFFTOWER_INLINE void max_of_items(const Registers<A, M>& s, typename A::F (&top)[A::kColumns]) {
  OFFTOWER_UNROLL
  for (int v = 0; v < A::kColumns; ++v) {
    top[v] = s[0][v];
    OFFTOWER_UNROLL
    for (int m = 1; m < M; ++m) top[v] = A::max(top[v], s[m][v]);
  }
}

// Whether the sum of a few items shows that a logit is far above the reference max, which costs
// less than the largest of them. Exponentials have to overflow to infinity for that, and the
// entropy needs the small slack.
template <class A, bool kEntropy>
constexpr bool kChecksSum = A::kHasPowerFactors && !kEntropy;
constexpr float kMaxSum = 1024.0f; // so the slack is log(1024) = 6.9

// Scores the items again, so that the usual path does not have to keep the logits.
template <class A, class T, int M, bool kMasked>
__attribute__((noinline, cold)) void raise_to_items(const Problem<A, T>& problem,
                                                    const ItemTile<A, T>& tile, int64_t item,
                                                    int64_t block, BlockSums<A>& sums,
                                                    const EligibleTile<A>* eligible,
                                                    int64_t first) {
  Registers<A, M> s;
  score<A, T, M>(problem, tile, item, block, s);
  if constexpr (kMasked) mask<A, M>(*eligible, item - first, s);
  typename A::F top[A::kColumns];
  max_of_items<A, M>(s, top);
  raise_reference_max<A>(top, sums);
}

// `eligible` has the bits of the items from `first` of the tile on; null without restriction.
template <class A, class T, int M, bool kReward, bool kEntropy, bool kMasked>
OFFTOWER_INLINE void add_items(const Problem<A, T>& problem, const ItemTile<A, T>& tile,
                               int64_t item, int64_t block, const float* dense, BlockSums<A>& sums,
                               const EligibleTile<A>* eligible, int64_t first) {
  constexpr int V = A::kColumns, W = A::kWidth;
  alignas(64) float mass[kReward ? M * kBlock<A> : 1];
  // The M items are summed before they are added: two short sums have a smaller error than one
  // long one.
  typename A::F sum[V], centered[V];
  for (bool raised = false;; raised = true) {
    Registers<A, M> s;
    score<A, T, M>(problem, tile, item, block, s);
    if constexpr (kMasked) mask<A, M>(*eligible, item - first, s);
    uint32_t over = 0;
    if constexpr (!kChecksSum<A, kEntropy>) {
      typename A::F top[V];
      max_of_items<A, M>(s, top);
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) over |= A::above(top[v], A::load(sums.limit + v * W));
      if (__builtin_expect(over != 0, 0)) raise_reference_max<A>(top, sums);
    }
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) {
      const auto reference_max = A::load(sums.reference_max + v * W);
      sum[v] = centered[v] = A::set(0.0f);
      constexpr int G = interleaved(M);
      OFFTOWER_UNROLL
      for (int m = 0; m < M; m += G) {
        typename A::F p[G];
        OFFTOWER_UNROLL
        for (int g = 0; g < G; ++g) p[g] = A::sub(s[m + g][v], reference_max);
        if constexpr (!kReward && !kEntropy) {
          sum[v] = add_exponentials<A, G>(p, sum[v]);
          continue;
        }
        exponential<A, G>(p);
        OFFTOWER_UNROLL
        for (int g = 0; g < G; ++g) {
          sum[v] = A::add(sum[v], p[g]);
          if constexpr (kEntropy) {
            const auto y = centered_log2<A>(s[m + g][v], reference_max);
            centered[v] = A::fma(p[g], A::max(A::set(kLogProbFloor), y), centered[v]);
          }
          if constexpr (kReward) A::store(mass + (m + g) * kBlock<A> + v * W, p[g]);
        }
      }
      if constexpr (kChecksSum<A, kEntropy>) over |= A::above(sum[v], A::set(kMaxSum));
    }
    if (!kChecksSum<A, kEntropy> || __builtin_expect(over == 0, 1) || raised) break;
    raise_to_items<A, T, M, kMasked>(problem, tile, item, block, sums, eligible, first);
  }
  OFFTOWER_UNROLL
  for (int v = 0; v < V; ++v) {
    A::store(sums.sum + v * W, A::add(A::load(sums.sum + v * W), sum[v]));
    if constexpr (kEntropy)
      A::store(sums.centered + v * W, A::add(A::load(sums.centered + v * W), centered[v]));
  }
  if constexpr (kReward) {
    Registers<A, M> q;
    rewards<A, T, M>(problem, tile, item, problem.reward_block(block), dense, q);
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) {
      auto reward = A::set(0.0f);
      OFFTOWER_UNROLL
      for (int m = 0; m < M; ++m)
        reward = A::fma(A::load(mass + m * kBlock<A> + v * W), q[m][v], reward);
      A::store(sums.reward + v * W, A::add(A::load(sums.reward + v * W), reward));
    }
  }
}

// Of a block's eligible items: the bits of a fold, and the next excluded item of each lane.
template <class A>
struct BlockEligible {
  EligibleTile<A> tile;
  int64_t cursor[kBlock<A>];
};

template <class A, class T, bool kReward, bool kEntropy, bool kMasked>
void add_tile(const Problem<A, T>& problem, const ItemTile<A, T>& tile, int64_t block, float* dense,
              BlockSums<A>& sums, const EligibleRows<A>* rows, BlockEligible<A>* eligible) {
  for (int64_t start = 0; start < tile.count; start += kFold) {
    const int64_t stop = min(start + kFold, tile.count);
    const EligibleTile<A>* bits = nullptr;
    if constexpr (kMasked) {
      bits = &eligible->tile;
      if (!rows->load(block, tile.begin + start, stop - start, eligible->cursor, eligible->tile))
        continue;
    }
    const bool is_dense = kReward && !problem.factored;
    if (is_dense) load_dense<A, T>(problem.o, block, tile.begin + start, stop - start, dense);
    const auto at = [&](int64_t i) { return is_dense ? dense + (i - start) * kBlock<A> : nullptr; };
    int64_t i = start;
    for (; i + kGroup <= stop; i += kGroup) {
      if (kMasked && !bits->any_of(i - start, kGroup)) continue;
      add_items<A, T, kGroup, kReward, kEntropy, kMasked>(problem, tile, i, block, at(i), sums,
                                                          bits, start);
    }
    for (; i < stop; ++i)
      add_items<A, T, 1, kReward, kEntropy, kMasked>(problem, tile, i, block, at(i), sums, bits,
                                                     start);
    sums.template fold<kReward, kEntropy>();
  }
}

template <class A, class T, bool kMasked>
class Forward {
public:
  Forward(const PolicyOperands& operands, const ForwardResults& results, Workers& workers)
      : problem_(operands), eligible_(operands), results_(results), workers_(workers),
        entropy_(results.entropy != nullptr || results.centered_sum != nullptr) {
    const int64_t items = operands.items, bytes = (operands.dim + operands.reward_dim) * 4;
    tile_items_ = max(kFold, kTileBytes / max(bytes, 1) / kFold * kFold);
    const int64_t folds = ceil_div(items, kFold);
    // From the sizes alone, so that the bits do not depend on the threads.
    const int64_t wanted = max(1, min(folds / kSegmentFolds, kSegments));
    segment_items_ = ceil_div(folds, wanted) * kFold;
    segments_ = ceil_div(items, segment_items_);
    groups_ = ceil_div(problem_.blocks, kGroupBlocks<A>);
    sums_.resize(segments_ * operands.rows);
    scratch_.fill(min(workers.threads(), segments_ * groups_), problem_, tile_items_);
  }

  bool run() {
    const auto task = [](void* self, int64_t index, int worker) {
      static_cast<Forward*>(self)->segment(index / static_cast<Forward*>(self)->groups_,
                                           index % static_cast<Forward*>(self)->groups_, worker);
    };
    if (!workers_.run(segments_ * groups_, task, this)) return false;
    const auto last = [](void* self, int64_t group, int worker) {
      static_cast<Forward*>(self)->finish(group, worker);
    };
    return workers_.run(groups_, last, this);
  }

private:
  struct Scratch {
    Scratch(const Problem<A, T>& problem, int64_t tile_items)
        : tile(problem, tile_items),
          dense(problem.o.reward == RewardKind::dense ? kFold * kBlock<A> : 0),
          sums(kGroupBlocks<A>), eligible(kMasked ? kGroupBlocks<A> : 0) {}
    ItemTile<A, T> tile;
    Buffer<float> dense;
    Buffer<BlockSums<A>> sums;
    Buffer<BlockEligible<A>> eligible;
  };

  void segment(int64_t segment, int64_t group, int worker) {
    const PolicyOperands& o = problem_.o;
    Scratch& mine = scratch_[worker];
    const int64_t first = group * kGroupBlocks<A>;
    const int64_t blocks = min(kGroupBlocks<A>, problem_.blocks - first);
    for (int64_t b = 0; b < blocks; ++b) {
      mine.sums[b].clear();
      if (kMasked) eligible_.seek(first + b, segment * segment_items_, mine.eligible[b].cursor);
    }
    const int64_t end = min((segment + 1) * segment_items_, o.items);
    for (int64_t begin = segment * segment_items_; begin < end; begin += tile_items_) {
      if (workers_.stopped(worker)) return;
      mine.tile.load(begin, min(tile_items_, end - begin));
      for (int64_t b = 0; b < blocks; ++b) add(mine, first, b);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const BlockSums<A>& sums = mine.sums[b];
      for (int64_t lane = 0; lane < kBlock<A>; ++lane) {
        const int64_t row = (first + b) * kBlock<A> + lane;
        if (row < o.rows)
          sums_[segment * o.rows + row] = {sums.total64[lane], sums.reward64[lane],
                                           sums.centered64[lane], sums.reference_max[lane]};
      }
    }
  }

  void add(Scratch& mine, int64_t first, int64_t b) {
    BlockSums<A>& sums = mine.sums[b];
    BlockEligible<A>* const bits = kMasked ? &mine.eligible[b] : nullptr;
    const int64_t block = first + b;
    const bool reward = problem_.o.reward != RewardKind::none;
    float* dense = mine.dense.get();
    if (reward && entropy_)
      add_tile<A, T, true, true, kMasked>(problem_, mine.tile, block, dense, sums, &eligible_,
                                          bits);
    else if (reward)
      add_tile<A, T, true, false, kMasked>(problem_, mine.tile, block, dense, sums, &eligible_,
                                           bits);
    else if (entropy_)
      add_tile<A, T, false, true, kMasked>(problem_, mine.tile, block, dense, sums, &eligible_,
                                           bits);
    else
      add_tile<A, T, false, false, kMasked>(problem_, mine.tile, block, dense, sums, &eligible_,
                                            bits);
  }

  RowSums merged(int64_t row) const {
    RowSums whole = sums_[row];
    for (int64_t k = 1; k < segments_; ++k) {
      RowSums part = sums_[k * problem_.o.rows + row];
      const float reference_max =
          part.reference_max > whole.reference_max ? part.reference_max : whole.reference_max;
      move(whole, reference_max);
      move(part, reference_max);
      whole.total += part.total;
      whole.reward += part.reward;
      whole.centered += part.centered;
    }
    return whole;
  }

  static void move(RowSums& sums, float reference_max) {
    if (sums.reference_max == reference_max) return;
    const double shift = (static_cast<double>(sums.reference_max) - reference_max) * kLog2E;
    const double factor = sums.total == 0.0 ? 0.0 : std::exp2(shift);
    sums.centered = sums.total == 0.0 ? 0.0 : factor * (sums.centered + sums.total * shift);
    sums.total *= factor;
    sums.reward *= factor;
    sums.reference_max = reference_max;
  }

  // Logit and reward of row `lane` of a block for its target, by the products of the tiles.
  struct Target {
    float logit, reward;
  };
  Target target(Scratch& mine, int64_t block, int64_t lane, int64_t action) {
    alignas(64) float values[kBlock<A>];
    mine.tile.load(action, 1);
    Target result{0.0f, 0.0f};
    Registers<A, 1> s;
    affine<A, 1>(mine.tile.rows, mine.tile.row_source.stride(), mine.tile.bias,
                 problem_.block(block), problem_.depth, problem_.scale, s);
    for (int v = 0; v < A::kColumns; ++v) A::store(values + v * A::kWidth, s[0][v]);
    result.logit = values[lane];
    const PolicyOperands& o = problem_.o;
    if (o.reward == RewardKind::dense) {
      const int64_t row = block * kBlock<A> + lane;
      result.reward = to_float(static_cast<const T*>(o.dense)[row * o.items + action]);
    } else if (problem_.factored) {
      rewards<A, T, 1>(problem_, mine.tile, 0, problem_.reward_block(block), nullptr, s);
      for (int v = 0; v < A::kColumns; ++v) A::store(values + v * A::kWidth, s[0][v]);
      result.reward = values[lane];
    }
    return result;
  }

  void finish(int64_t group, int worker) {
    const PolicyOperands& o = problem_.o;
    const auto put = [](float* array, int64_t row, double value) {
      if (array != nullptr) array[row] = static_cast<float>(value);
    };
    constexpr int64_t kRows = kGroupBlocks<A> * kBlock<A>;
    for (int64_t row = group * kRows; row < min((group + 1) * kRows, o.rows); ++row) {
      const RowSums sums = merged(row);
      const double log_total = std::log(sums.total);
      const double log_normalizer = sums.reference_max + log_total;
      const int64_t action = o.action == nullptr ? -1 : o.action[row];
      if (action >= 0) {
        const Target found = target(scratch_[worker], row / kBlock<A>, row % kBlock<A>, action);
        put(results_.log_prob, row,
            (static_cast<double>(found.logit) - sums.reference_max) - log_total);
        put(results_.action_logit, row, found.logit);
        put(results_.action_reward, row, found.reward);
      } else {
        put(results_.log_prob, row, -INFINITY);
        put(results_.action_logit, row, -INFINITY);
        put(results_.action_reward, row, 0.0);
      }
      // If all items are masked, the total is 0 and the reference max stands for -inf.
      put(results_.log_normalizer, row, sums.total == 0.0 ? -INFINITY : log_normalizer);
      put(results_.expected_reward, row, sums.reward / sums.total);
      put(results_.entropy, row, log_total - sums.centered / sums.total / kLog2E);
      put(results_.reference_max, row, sums.total == 0.0 ? -INFINITY : sums.reference_max);
      put(results_.total, row, sums.total);
      put(results_.reward_sum, row, sums.reward);
      put(results_.centered_sum, row, sums.centered / kLog2E);
    }
  }

  const Problem<A, T> problem_;
  const EligibleRows<A> eligible_;
  const ForwardResults results_;
  Workers& workers_;
  const bool entropy_;
  int64_t tile_items_, segment_items_, segments_, groups_;
  Buffer<RowSums> sums_;
  Objects<Scratch> scratch_;
};

template <class A, class T>
bool forward(const PolicyOperands& operands, const ForwardResults& results, Workers& workers) {
  if (operands.eligible.restricts()) return Forward<A, T, true>(operands, results, workers).run();
  return Forward<A, T, false>(operands, results, workers).run();
}

} // namespace
} // namespace offtower::cpu
