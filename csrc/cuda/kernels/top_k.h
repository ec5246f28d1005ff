// The k largest scores of each context. Each warp appends the scores above a row's threshold to the row's
// candidate list; a list that could overflow with the next tile is sorted and truncated to k, which raises
// the threshold. Candidates are 64-bit keys with a total order, so that the result depends neither on the
// order of arrival nor on the splits.
#pragma once

#include "../epilogue/eligible.h"
#include "../mainloop/cp_async_mainloop.h"

namespace offtower::cuda {

// Orders NaN first, then by descending score, then by ascending item. Never 0, which pads lists.
OFFTOWER_DEVICE uint64_t candidate_key(float score, int64_t item) {
  const uint32_t bits = float_as_uint(score + 0.0f); // -0 and 0 are equal
  const uint32_t rank = score != score ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(rank) << 32 | (0xffffffffu - static_cast<uint32_t>(item));
}
OFFTOWER_DEVICE float score_of_key(uint64_t key) {
  const uint32_t rank = static_cast<uint32_t>(key >> 32);
  if (rank == 0xffffffffu) return quiet_nan();
  return uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank);
}
OFFTOWER_DEVICE int64_t item_of_key(uint64_t key) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// A power of two with room for k and the candidates of two tiles, and for two lists of k.
OFFTOWER_BOTH constexpr int64_t list_capacity(int64_t k) {
  int64_t capacity = 128;
  while (capacity < 2 * k || capacity < k + 128) capacity *= 2;
  return capacity;
}

// Bitonic sort in descending order, by one warp; `capacity` is a power of two.
OFFTOWER_DEVICE void sort_list(uint64_t* list, int64_t capacity) {
  for (int64_t run = 2; run <= capacity; run *= 2) {
    for (int64_t gap = run / 2; gap > 0; gap /= 2) {
      syncwarp();
      for (int64_t i = lane_idx(); i < capacity / 2; i += 32) {
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
  syncwarp();
}

struct TopKParams {
  PolicyParams policy;
  float inverse_temperature;
  int64_t k, capacity;
  uint64_t* lists;         // (splits, contexts, capacity)
  EligibleParams eligible; // of masked kernels
};

template <class T, bool kMasked>
struct TopK {
  using Params = TopKParams;
  static constexpr int kBlockN = kBlockNOf<T>, kMmaN = kBlockN / 8;
  static constexpr int kWarpM = kAtomM, kMaxThreadsPerBlock = 256, kMinBlocksPerMultiprocessor = 2;
  static constexpr int kColumnVectors = 2;
  static constexpr int kWarpScratchBytes = kAtomM * 8; // a count and a threshold for each row
  static_assert(2 * kBlockN <= 128, "list_capacity leaves room for two tiles");

  static OFFTOWER_DEVICE void run(const Params& p, char* shared) {
    const PolicyParams& o = p.policy;
    const int warps = block_dim() / 32, block_m = warps * kWarpM;
    const SharedLayout l =
        shared_layout(tile_shape<TopK, T>(), warps, o.resident.width, 0, o.stages);
    const WorkTile work = work_tile(o, block_idx(), block_m, kBlockN);
    TopK self(p, work, reinterpret_cast<int*>(shared + l.scratch + warp_idx() * kWarpScratchBytes));
    cp_async_mainloop<T>(
        o, l, work, block_m, shared,
        [&](int64_t first, float* vectors) { load_item_biases<T>(o, first, vectors, 1.0f); },
        [&](int64_t first, const char* stage) { self.add_tile(shared, l, first, stage); });
    for (int r = 0; r < kWarpM; ++r) self.truncate(r);
  }

private:
  OFFTOWER_DEVICE TopK(const Params& params, const WorkTile& work, int* scratch)
      : p(params), row(work.first_row + warp_idx() * kWarpM),
        lists(params.lists + (work.split * params.policy.resident.rows + row) * params.capacity),
        count(scratch), threshold(reinterpret_cast<float*>(scratch) + kWarpM) {
    if (lane_idx() < kWarpM) {
      count[lane_idx()] = 0;
      threshold[lane_idx()] = quiet_nan(); // no score is <= NaN
    }
    syncwarp();
  }

  OFFTOWER_DEVICE void add_tile(const char* shared, const SharedLayout& l, int64_t first,
                                const char* stage) {
    const PolicyParams& o = p.policy;
    const float* bias = reinterpret_cast<const float*>(stage + l.vectors);
    const int g = lane_idx() / 4, t = lane_idx() % 4;
    float s[1][kMmaN][4];
    score_gemm(T{}, shared + l.resident + warp_idx() * kWarpM * l.resident_pitch, stage,
               l.resident_pitch, (l.resident_pitch - 16) / kStepBytes, s);
    const float limit[2] = {threshold[g], threshold[g + 8]};
    uint64_t eligible[2] = {}; // of the thread's rows, from the tile's first item on
    if constexpr (kMasked) {
      OFFTOWER_UNROLL
      for (int h = 0; h < 2; ++h)
        if (row + g + h * 8 < o.resident.rows)
          eligible[h] = p.eligible.items_from(row + g + h * 8, first);
    }
    const auto admits = [&](int n, int e) {
      return !kMasked || (eligible[e / 2] >> (n * 8 + 2 * t + e % 2) & 1) != 0;
    };
    bool any = false;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) {
        // In nats, unlike in the other kernels: scores are returned as they are.
        s[0][n][e] = fma(s[0][n][e], p.inverse_temperature, bias[n * 8 + 2 * t + e % 2]);
        any |= !(s[0][n][e] <= limit[e / 2]) && admits(n, e);
      }
    }
    if (ballot_sync(any) == 0) return;
    OFFTOWER_UNROLL
    for (int n = 0; n < kMmaN; ++n) {
      OFFTOWER_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = g + e / 2 * 8;
        const int64_t item = first + n * 8 + 2 * t + e % 2;
        if (s[0][n][e] <= limit[e / 2] || item >= o.items || row + r >= o.resident.rows) continue;
        if (!admits(n, e)) continue;
        lists[r * p.capacity + atomic_add(&count[r], 1)] = candidate_key(s[0][n][e], item);
      }
    }
    syncwarp();
    for (int r = 0; r < kWarpM; ++r)
      if (count[r] > p.capacity - kBlockN) truncate(r);
  }

  OFFTOWER_DEVICE void truncate(int r) {
    if (row + r >= p.policy.resident.rows) return;
    uint64_t* list = lists + r * p.capacity;
    const int64_t filled = count[r];
    for (int64_t i = filled + lane_idx(); i < p.capacity; i += 32) list[i] = 0;
    sort_list(list, p.capacity);
    if (lane_idx() == 0 && filled >= p.k) {
      count[r] = static_cast<int>(p.k);
      threshold[r] = score_of_key(list[p.k - 1]);
    }
    syncwarp();
  }

  const Params& p;
  const int64_t row;
  uint64_t* const lists;
  int* const count;
  float* const threshold;
};

// Merges the lists of all splits; a warp for each context.
struct TopKCombineParams {
  uint64_t* lists; // (splits, contexts, capacity), each sorted
  int64_t contexts, k, capacity;
  int splits;
  float* score;
  int64_t* index;
};

template <bool kMasked>
struct TopKCombine {
  using Params = TopKCombineParams;
  static constexpr int kMaxThreadsPerBlock = 128, kMinBlocksPerMultiprocessor = 1;

  static OFFTOWER_DEVICE void run(const Params& p, char*) {
    const int64_t row = block_idx() * (block_dim() / 32) + warp_idx();
    if (row >= p.contexts) return;
    uint64_t* list = p.lists + row * p.capacity;
    for (int split = 1; split < p.splits; ++split) {
      const uint64_t* other = p.lists + (split * p.contexts + row) * p.capacity;
      for (int64_t i = p.k + lane_idx(); i < p.capacity; i += 32)
        list[i] = i < 2 * p.k ? other[i - p.k] : 0;
      sort_list(list, p.capacity);
    }
    for (int64_t i = lane_idx(); i < p.k; i += 32) {
      const bool none = kMasked && list[i] == 0; // padding
      p.score[row * p.k + i] = none ? -infinity() : score_of_key(list[i]);
      p.index[row * p.k + i] = none ? -1 : item_of_key(list[i]);
    }
  }
};

} // namespace offtower::cuda
