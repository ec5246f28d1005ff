// The k largest scores of each context. A warp owns its rows: what exceeds a row's threshold goes to
// the row's list, and a list that could overflow with the next tile is sorted and cut to k, which
// raises the threshold. Candidates are 64-bit keys with a total order, so that the result depends
// neither on the order of arrival nor on how the items were split.
#pragma once

#include "stream.h"

namespace offtower::cuda {

// NaN first, then falling scores, of equal ones the lowest item. Never 0.
OFFTOWER_DEVICE uint64_t candidate_key(float score, int64_t item) {
  const uint32_t bits = bits_of_float(score + 0.0f); // -0 and 0 are equal
  const uint32_t rank = score != score ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(rank) << 32 | (0xffffffffu - static_cast<uint32_t>(item));
}
OFFTOWER_DEVICE float score_of_key(uint64_t key) {
  const uint32_t rank = static_cast<uint32_t>(key >> 32);
  if (rank == 0xffffffffu) return float_of_bits(0x7fc00000u);
  return float_of_bits(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}
OFFTOWER_DEVICE int64_t item_of_key(uint64_t key) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// Room for k and for what two tiles may add, or for two lists of k: a power of two.
OFFTOWER_BOTH constexpr int64_t list_capacity(int64_t k) {
  int64_t capacity = 128;
  while (capacity < 2 * k || capacity < k + 128) capacity *= 2;
  return capacity;
}

// Bitonic, falling, by one warp; `capacity` is a power of two.
OFFTOWER_DEVICE void sort_list(uint64_t* list, int64_t capacity) {
  for (int64_t run = 2; run <= capacity; run *= 2) {
    for (int64_t gap = run / 2; gap > 0; gap /= 2) {
      sync_warp();
      for (int64_t i = thread_index() % 32; i < capacity / 2; i += 32) {
        const int64_t low = i / gap * 2 * gap + i % gap, high = low + gap;
        const uint64_t a = list[low], b = list[high];
        const bool falling = (low & run) == 0;
        if (falling ? a < b : a > b) {
          list[low] = b;
          list[high] = a;
        }
      }
    }
  }
  sync_warp();
}

struct TopKProblem {
  Problem policy;
  float inverse_temperature;
  int64_t k, capacity;
  uint64_t* lists; // (splits, contexts, capacity)
};

template <class T>
struct TopK {
  using Params = TopKProblem;
  static constexpr int kColumns = Tiling<T>::kColumns, kTiles = kColumns / 8;
  static constexpr int kRows = kWarpRows, kMostThreads = 256, kBlocks = 2;
  static constexpr int kVectors = 2, kScratch = kWarpRows * 8; // a count and a threshold a row

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const Problem& o = p.policy;
    const int warps = thread_count() / 32, rows = warps * kRows;
    const SharedLayout l = shared_layout(sizeof(T), kColumns, rows, o.stay.width, 0, kVectors,
                                         o.stages, kScratch, warps);
    const Share share = share_of_block<T>(o, rows);
    TopK self(p, share, reinterpret_cast<int*>(shared + l.scratch + warp_index() * kScratch));
    for_each_tile<T>(
        o, l, share, rows, shared,
        [&](int64_t first, float* vectors) { load_item_biases<T>(o, first, vectors, 1.0f); },
        [&](int64_t first, const char* stage) { self.tile(shared, l, first, stage); });
    for (int r = 0; r < kRows; ++r) self.cut(r);
  }

private:
  OFFTOWER_DEVICE TopK(const Params& params, const Share& share, int* scratch)
      : p(params), row(share.first_row + warp_index() * kRows),
        lists(params.lists + (share.split * params.policy.stay.rows + row) * params.capacity),
        count(scratch), threshold(reinterpret_cast<float*>(scratch) + kRows) {
    if (lane_index() < kRows) {
      count[lane_index()] = 0;
      threshold[lane_index()] = float_of_bits(0x7fc00000u); // nothing is at or below it
    }
    sync_warp();
  }

  OFFTOWER_DEVICE void tile(const char* shared, const SharedLayout& l, int64_t first,
                            const char* stage) {
    const Problem& o = p.policy;
    const float* bias = reinterpret_cast<const float*>(stage + l.vectors);
    const int g = lane_index() / 4, t = lane_index() % 4;
    float s[1][kTiles][4];
    scores<1, kTiles>(T{}, shared + l.stay + warp_index() * kRows * l.stay_pitch, stage,
                      l.stay_pitch, (l.stay_pitch - 16) / kStep, s);
    const float limit[2] = {threshold[g], threshold[g + 8]};
    bool any = false;
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) {
        // In nats here: scores are returned as they are.
        s[0][n][e] = fused(s[0][n][e], p.inverse_temperature, bias[n * 8 + 2 * t + e % 2]);
        any |= !(s[0][n][e] <= limit[e / 2]);
      }
    }
    if (ballot(any) == 0) return;
    OFFTOWER_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = g + e / 2 * 8;
        const int64_t item = first + n * 8 + 2 * t + e % 2;
        if (s[0][n][e] <= limit[e / 2] || item >= o.items || row + r >= o.stay.rows) continue;
        lists[r * p.capacity + add_to_counter(&count[r], 1)] = candidate_key(s[0][n][e], item);
      }
    }
    sync_warp();
    for (int r = 0; r < kRows; ++r)
      if (count[r] > p.capacity - kColumns) cut(r);
  }

  OFFTOWER_DEVICE void cut(int r) {
    if (row + r >= p.policy.stay.rows) return;
    uint64_t* list = lists + r * p.capacity;
    const int64_t filled = count[r];
    for (int64_t i = filled + lane_index(); i < p.capacity; i += 32) list[i] = 0;
    sort_list(list, p.capacity);
    if (lane_index() == 0 && filled >= p.k) {
      count[r] = static_cast<int>(p.k);
      threshold[r] = score_of_key(list[p.k - 1]);
    }
    sync_warp();
  }

  const Params& p;
  const int64_t row;
  uint64_t* const lists;
  int* const count;
  float* const threshold;
};

// The lists of all splits into one, a warp a context.
struct MergeTopKProblem {
  uint64_t* lists; // (splits, contexts, capacity), each sorted
  int64_t contexts, k, capacity;
  int splits;
  float* score;
  int64_t* index;
};

struct MergeTopK {
  using Params = MergeTopKProblem;
  static constexpr int kMostThreads = 128, kBlocks = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t row = block_index() * (thread_count() / 32) + warp_index();
    if (row >= p.contexts) return;
    uint64_t* list = p.lists + row * p.capacity;
    for (int split = 1; split < p.splits; ++split) {
      const uint64_t* other = p.lists + (split * p.contexts + row) * p.capacity;
      for (int64_t i = p.k + lane_index(); i < p.capacity; i += 32)
        list[i] = i < 2 * p.k ? other[i - p.k] : 0;
      sort_list(list, p.capacity);
    }
    for (int64_t i = lane_index(); i < p.k; i += 32) {
      p.score[row * p.k + i] = score_of_key(list[i]);
      p.index[row * p.k + i] = item_of_key(list[i]);
    }
  }
};

} // namespace offtower::cuda
