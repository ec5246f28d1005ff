// Draws from the softmax of each row, by inversion on two levels: a tile of items, then an item of it.
//
// One pass over the items leaves (max, sum) of each tile and row. A draw finds its tile in the sums
// and scores that tile's items again; the rows that chose the same tile are scored together. So k
// draws cost about one forward pass and k tiles a row.
//
// Without replacement the first k draws are made with replacement, and repeats dropped: what remains
// is distributed as draws without replacement, for each new item is distributed as the items that are
// not there yet. The missing ones are drawn one by one, with the items that are there taken out of
// their tiles' sums: those tiles are summed again, so nothing cancels where they held nearly all mass.
#pragma once

#include <cmath>

#include "../distinct.h"
#include "../philox.h"
#include "forward.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kTileSumBytes = 64 << 20;             // of the tiles' sums at a time, over rows
constexpr uint32_t kWithReplacement = 0, kOneByOne = 1; // purposes of random numbers
static_assert(kTileUnit % kFold == 0 && kTileUnit % 64 == 0, "tiles are whole folds and words");

// The first i with sums[i] > point, and the last i that has a mass where rounding left none.
inline int64_t invert(const double* sums, int64_t count, double point) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sums[middle] > point)
      high = middle;
    else
      low = middle + 1;
  }
  if (low < count) return low;
  for (low = count - 1; low > 0 && sums[low] == sums[low - 1];) --low;
  return low;
}

template <class A, class T, bool kMasked>
class Draw {
public:
  Draw(const PolicyOperands& operands, const DrawResults& results, Workers& workers)
      : problem_(operands), eligible_(operands), out_(results), workers_(workers),
        tiles_(ceil_div(operands.items, results.tile)) {
    const int64_t bytes = max(1, operands.dim * static_cast<int64_t>(sizeof(float)));
    cached_items_ = min(out_.tile, max(kFold, kTileBytes / bytes / kFold * kFold));
    const int64_t fitting = kTileSumBytes / (tiles_ * L * 2 * static_cast<int64_t>(sizeof(float)));
    chunk_blocks_ = min(problem_.blocks, max(fitting, kGroupBlocks<A>));
    max_.resize(chunk_blocks_ * tiles_ * L);
    sum_.resize(chunk_blocks_ * tiles_ * L);
    const int64_t rows = min(chunk_blocks_ * L, operands.rows);
    row_.resize(rows);
    tile_of_.resize(rows * out_.count);
    order_.resize(rows * out_.count);
    first_.resize(tiles_ + 1);
    scratch_.fill(workers.threads(), problem_, out_.tile, tiles_);
  }

  bool run() {
    for (first_block_ = 0; first_block_ < problem_.blocks; first_block_ += chunk_blocks_) {
      blocks_ = min(chunk_blocks_, problem_.blocks - first_block_);
      rows_ = min(blocks_ * L, problem_.o.rows - first_block_ * L);
      groups_ = ceil_div(blocks_, kGroupBlocks<A>);
      // No result depends on the split.
      segments_ = min(tiles_, ceil_div(8 * workers_.threads(), groups_));
      if (!each<&Draw::sum_tiles>(segments_ * groups_)) return false;
      if (!each<&Draw::choose_tiles>(blocks_)) return false;
      sort_by_tile();
      if (!each<&Draw::choose_items>(tiles_)) return false;
      if (!out_.replacement && !each<&Draw::complete>(rows_)) return false;
    }
    return true;
  }

private:
  static constexpr int L = kBlock<A>, W = A::kWidth;

  struct Row {
    double reference_max, total; // of all items; a total of 0 or NaN permits no draw
  };

  struct Scratch {
    Scratch(const Problem<A, T>& problem, int64_t tile_items, int64_t tiles)
        : tile(problem, tile_items), sums(kGroupBlocks<A>), eligible(kMasked ? kGroupBlocks<A> : 0),
          block(problem.depth * L), logit(tile_items * L), mass(max(tile_items, tiles) * L),
          cumulative(max(tile_items, tiles)), base(tiles), total(tiles), weight(tiles) {}
    ItemTile<A, T> tile;
    Buffer<BlockSums<A>> sums;
    Buffer<BlockEligible<A>> eligible;
    Buffer<typename A::Unit> block; // contexts of the rows that are scored
    Buffer<float> logit, mass;      // [item][lane]
    Buffer<double> cumulative;
    alignas(64) float top[L];
    Buffer<double> base, total, weight; // of the tiles of one row, for draws one by one
    double reference_max;               // of the weights
  };

  template <void (Draw::*Step)(int64_t, int)>
  bool each(int64_t count) {
    const auto task = [](void* self, int64_t index, int worker) {
      (static_cast<Draw*>(self)->*Step)(index, worker);
    };
    return workers_.run(count, task, this);
  }

  int64_t tile_items(int64_t tile) const {
    return min(out_.tile, problem_.o.items - tile * out_.tile);
  }

  // (max, sum) of the tiles of a segment, for a group of blocks.
  void sum_tiles(int64_t index, int worker) {
    Scratch& mine = scratch_[worker];
    const int64_t segment = index / groups_, first = index % groups_ * kGroupBlocks<A>;
    const int64_t blocks = min(kGroupBlocks<A>, blocks_ - first);
    const int64_t begin_tile = tiles_ * segment / segments_;
    for (int64_t b = 0; kMasked && b < blocks; ++b)
      eligible_.seek(first_block_ + first + b, begin_tile * out_.tile, mine.eligible[b].cursor);
    for (int64_t t = begin_tile; t < tiles_ * (segment + 1) / segments_; ++t) {
      if (workers_.stopped(worker)) return;
      for (int64_t b = 0; b < blocks; ++b) mine.sums[b].clear();
      const int64_t end = t * out_.tile + tile_items(t);
      for (int64_t begin = t * out_.tile; begin < end; begin += cached_items_) {
        mine.tile.load(begin, min(cached_items_, end - begin));
        for (int64_t b = 0; b < blocks; ++b)
          add_tile<A, T, false, false, kMasked>(problem_, mine.tile, first_block_ + first + b,
                                                nullptr, mine.sums[b], &eligible_,
                                                kMasked ? &mine.eligible[b] : nullptr);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = ((first + b) * tiles_ + t) * L;
        for (int lane = 0; lane < L; ++lane) {
          max_[at + lane] = mine.sums[b].reference_max[lane];
          sum_[at + lane] = static_cast<float>(mine.sums[b].total64[lane]);
        }
      }
    }
  }

  // The tiles of all draws of a block's rows.
  void choose_tiles(int64_t block, int worker) {
    Scratch& mine = scratch_[worker];
    const float* const tile_max = max_.get() + block * tiles_ * L;
    const float* const tile_sum = sum_.get() + block * tiles_ * L;
    for (int64_t v = 0; v < A::kColumns; ++v) {
      auto top = A::set(kInitialMax);
      for (int64_t t = 0; t < tiles_; ++t) top = A::max(A::load(tile_max + t * L + v * W), top);
      A::store(mine.top + v * W, top);
      for (int64_t t = 0; t < tiles_; ++t) {
        const int64_t at = t * L + v * W;
        const auto factor = exponential<A>(A::sub(A::load(tile_max + at), top));
        A::store(mine.mass.get() + at, A::mul(A::load(tile_sum + at), factor));
      }
    }
    for (int64_t lane = 0; lane < L && block * L + lane < rows_; ++lane) {
      const int64_t row = block * L + lane;
      const double total = accumulate_lane(mine, tiles_, L, lane);
      row_[row] = {mine.top[lane], total};
      const bool possible = total > 0.0 && total < INFINITY;
      const int64_t at = first_block_ * L + row;
      out_.reference_max[at] = total == 0.0 ? -INFINITY : mine.top[lane];
      out_.total[at] = static_cast<float>(total);
      for (int64_t j = 0; j < out_.count; ++j) {
        out_.index[at * out_.count + j] = -1;
        out_.log_prob[at * out_.count + j] = -INFINITY;
        tile_of_[row * out_.count + j] =
            possible ? static_cast<int32_t>(invert(mine.cumulative.get(), tiles_,
                                                   random(row, j, kWithReplacement).first * total))
                     : -1;
      }
    }
  }

  UniformPair random(int64_t row, int64_t draw, uint32_t purpose) const {
    return uniform_pair(out_.seed, out_.stream[first_block_ * L + row], draw, purpose);
  }

  // Fills `cumulative` with the masses of a lane; returns their sum.
  static double accumulate_lane(Scratch& mine, int64_t count, int64_t lanes, int64_t lane) {
    double total = 0.0;
    const float* mass = mine.mass.get() + lane;
    for (int64_t i = 0; i < count; ++i, mass += lanes) mine.cumulative[i] = total += *mass;
    return total;
  }

  // Numbers of all draws, by tile and then by row.
  void sort_by_tile() {
    const int64_t draws = rows_ * out_.count;
    for (int64_t t = 0; t <= tiles_; ++t) first_[t] = 0;
    for (int64_t i = 0; i < draws; ++i)
      if (tile_of_[i] >= 0) ++first_[tile_of_[i] + 1];
    for (int64_t t = 0; t < tiles_; ++t) first_[t + 1] += first_[t];
    for (int64_t i = 0; i < draws; ++i)
      if (tile_of_[i] >= 0) order_[first_[tile_of_[i]]++] = i;
    for (int64_t t = tiles_; t > 0; --t) first_[t] = first_[t - 1];
    first_[0] = 0;
  }

  // The items of all draws that chose a tile.
  void choose_items(int64_t tile, int worker) {
    Scratch& mine = scratch_[worker];
    int64_t at = first_[tile];
    const int64_t end = first_[tile + 1];
    if (at == end) return;
    mine.tile.load(tile * out_.tile, tile_items(tile));
    while (at < end) {
      if (workers_.stopped(worker)) return;
      int64_t rows[L], begin[L + 1], lanes = 0;
      for (; at < end; ++at) {
        const int64_t row = order_[at] / out_.count;
        if (lanes > 0 && rows[lanes - 1] == row) continue;
        if (lanes == L) break;
        rows[lanes] = row;
        begin[lanes++] = at;
      }
      begin[lanes] = at;
      if (lanes <= W)
        choose_for_rows<1>(mine, rows, begin, lanes);
      else
        choose_for_rows<A::kColumns>(mine, rows, begin, lanes);
    }
  }

  template <int V>
  void choose_for_rows(Scratch& mine, const int64_t* rows, const int64_t* begin, int64_t lanes) {
    score<V>(mine, rows, lanes);
    weigh<V>(mine);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double total = accumulate_lane(mine, mine.tile.count, V * W, lane);
      for (int64_t at = begin[lane]; at < begin[lane + 1]; ++at) {
        const int64_t draw = order_[at] % out_.count;
        const double point = random(rows[lane], draw, kWithReplacement).second * total;
        const int64_t item = invert(mine.cumulative.get(), mine.tile.count, point);
        put(rows[lane], draw, mine.tile.begin + item, mine.logit[item * V * W + lane]);
      }
    }
  }

  void put(int64_t row, int64_t draw, int64_t item, float logit) {
    const int64_t at = (first_block_ * L + row) * out_.count + draw;
    out_.index[at] = item;
    out_.log_prob[at] =
        static_cast<float>((logit - row_[row].reference_max) - std::log(row_[row].total));
  }

  // Logits of the loaded tile for up to V * W rows.
  template <int V>
  void score(Scratch& mine, const int64_t* rows, int64_t lanes) {
    typename A::Unit* const block = mine.block.get();
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t row = first_block_ * L + rows[lane];
      const typename A::Unit* source = problem_.block(row / L) + row % L;
      for (int64_t k = 0; k < problem_.depth; ++k) block[k * V * W + lane] = source[k * L];
    }
    int64_t i = 0;
    for (; i + kGroup <= mine.tile.count; i += kGroup) score_items<kGroup, V>(mine, i);
    for (; i < mine.tile.count; ++i) score_items<1, V>(mine, i);
    if (!kMasked) return;
    for (int64_t lane = 0; lane < lanes; ++lane)
      mask_lane(mine, first_block_ * L + rows[lane], V * W, lane);
  }

  template <int M, int V>
  OFFTOWER_INLINE void score_items(Scratch& mine, int64_t item) {
    typename A::F s[M][V];
    const ItemTile<A, T>& tile = mine.tile;
    const int64_t stride = tile.row_source.stride();
    affine<A>(tile.rows + item * stride, stride, tile.bias_at(item), mine.block.get(),
              problem_.depth, problem_.scale, s);
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) A::store(mine.logit.get() + ((item + m) * V + v) * W, s[m][v]);
    }
  }

  void mask_lane(Scratch& mine, int64_t row, int64_t lanes, int64_t lane) {
    const Eligibility& e = problem_.o.eligible;
    float* const logit = mine.logit.get() + lane;
    if (e.bitmap != nullptr) {
      const uint64_t* const words = e.bitmap + e.group[row] * e.words + mine.tile.begin / 64;
      for (int64_t i = 0; i < mine.tile.count; ++i)
        if ((words[i / 64] >> (i % 64) & 1) == 0) logit[i * lanes] = -INFINITY;
    }
    if (e.excluded.offsets == nullptr) return;
    const int64_t end = e.excluded.offsets[row + 1];
    for (int64_t at = eligible_.first_excluded(row, mine.tile.begin);
         at < end && e.excluded.items[at] < mine.tile.begin + mine.tile.count; ++at)
      logit[(e.excluded.items[at] - mine.tile.begin) * lanes] = -INFINITY;
  }

  // Masses from the logits of the loaded tile, relative to each lane's largest.
  template <int V>
  void weigh(Scratch& mine) {
    const int64_t count = mine.tile.count;
    for (int64_t v = 0; v < V; ++v) {
      auto top = A::set(kInitialMax);
      for (int64_t i = 0; i < count; ++i)
        top = A::max(A::load(mine.logit.get() + (i * V + v) * W), top);
      A::store(mine.top + v * W, top);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (i * V + v) * W;
        A::store(mine.mass.get() + at, exponential<A>(A::sub(A::load(mine.logit.get() + at), top)));
      }
    }
  }

  // Draws the items that repeats left out, without the items that are there.
  void complete(int64_t row, int worker) {
    if (workers_.stopped(worker)) return;
    const int64_t at = (first_block_ * L + row) * out_.count;
    int64_t* const index = out_.index + at;
    if (index[0] < 0) return;
    int64_t found = keep_distinct(index, out_.log_prob + at, out_.count);
    for (int64_t j = found; j < out_.count; ++j) {
      index[j] = -1;
      out_.log_prob[at + j] = -INFINITY;
    }
    if (found == out_.count) return;
    Scratch& mine = scratch_[worker];
    const int64_t lane = (row / L) * tiles_ * L + row % L;
    for (int64_t t = 0; t < tiles_; ++t) {
      mine.base[t] = max_[lane + t * L];
      mine.total[t] = sum_[lane + t * L];
    }
    for (int64_t j = 0; j < found; ++j) {
      bool first = true;
      for (int64_t i = 0; i < j; ++i) first = first && index[i] / out_.tile != index[j] / out_.tile;
      if (!first) continue;
      score_rest(mine, row, index[j] / out_.tile, index, found);
      sum_scored(mine, index[j] / out_.tile);
    }
    double left = 0.0;
    for (; found < out_.count; ++found) {
      if (workers_.stopped(worker)) return;
      // Weights stay relative to one tile's max until hardly anything is left of them.
      if (left < 1e-200) left = weigh_tiles(mine);
      if (left == 0.0) return;
      for (int64_t t = 0; t < tiles_; ++t)
        mine.cumulative[t] = mine.weight[t] + (t == 0 ? 0.0 : mine.cumulative[t - 1]);
      const UniformPair u = random(row, found, kOneByOne);
      const int64_t tile =
          invert(mine.cumulative.get(), tiles_, u.first * mine.cumulative[tiles_ - 1]);
      score_rest(mine, row, tile, index, found);
      weigh<1>(mine);
      const double total = accumulate_lane(mine, mine.tile.count, W, 0);
      const int64_t item = invert(mine.cumulative.get(), mine.tile.count, u.second * total);
      put(row, found, mine.tile.begin + item, mine.logit[item * W]);
      mine.logit[item * W] = -INFINITY;
      sum_scored(mine, tile);
      mine.weight[tile] = weight_of(mine, tile);
      left = 0.0;
      for (int64_t t = 0; t < tiles_; ++t) left += mine.weight[t];
    }
  }

  // Logits of a tile for one row, -inf for the items that are there.
  void score_rest(Scratch& mine, int64_t row, int64_t tile, const int64_t* index, int64_t found) {
    mine.tile.load(tile * out_.tile, tile_items(tile));
    score<1>(mine, &row, 1);
    for (int64_t j = 0; j < found; ++j)
      if (index[j] / out_.tile == tile) mine.logit[(index[j] - mine.tile.begin) * W] = -INFINITY;
  }

  // (max, sum) of the tile whose logits are there, for one row.
  void sum_scored(Scratch& mine, int64_t tile) {
    weigh<1>(mine);
    double total = 0.0;
    for (int64_t i = 0; i < mine.tile.count; ++i) total += mine.mass[i * W];
    mine.base[tile] = mine.top[0];
    mine.total[tile] = total;
  }

  // Weights of a row's tiles, relative to the largest max; returns their sum.
  double weigh_tiles(Scratch& mine) {
    mine.reference_max = kInitialMax;
    for (int64_t t = 0; t < tiles_; ++t)
      if (mine.total[t] > 0.0 && mine.base[t] > mine.reference_max)
        mine.reference_max = mine.base[t];
    double left = 0.0;
    for (int64_t t = 0; t < tiles_; ++t) left += mine.weight[t] = weight_of(mine, t);
    return left;
  }

  static double weight_of(const Scratch& mine, int64_t tile) {
    const double total = mine.total[tile];
    return total > 0.0 ? total * std::exp(mine.base[tile] - mine.reference_max) : 0.0;
  }

  const Problem<A, T> problem_;
  const EligibleRows<A> eligible_;
  const DrawResults out_;
  Workers& workers_;
  const int64_t tiles_;
  int64_t cached_items_, chunk_blocks_;
  int64_t first_block_ = 0, blocks_ = 0, rows_ = 0, groups_ = 0, segments_ = 0; // of a chunk
  Buffer<float> max_, sum_; // [block][tile][lane]
  Buffer<Row> row_;
  Buffer<int32_t> tile_of_; // [row][draw]
  Buffer<int64_t> order_, first_;
  Objects<Scratch> scratch_;
};

template <class A, class T>
bool draw(const PolicyOperands& operands, const DrawResults& results, Workers& workers) {
  if (operands.eligible.restricts()) return Draw<A, T, true>(operands, results, workers).run();
  return Draw<A, T, false>(operands, results, workers).run();
}

} // namespace
} // namespace offtower::cpu
