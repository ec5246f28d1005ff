// Biases of streamed items: logit biases, then those of a factored reward model.
#pragma once

#include "../kernels/params.h"

namespace offtower::cuda {

// Column i of a tile whose first item is `first`. Logit biases are multiplied by `unit`, and are -inf
// beyond the last item, which masks the padding of the last tile.
template <class T, int kBlockN>
OFFTOWER_DEVICE void load_item_bias(const PolicyParams& p, int64_t first, int i, float* vectors,
                                    float unit) {
  const int64_t item = first + i;
  float bias = item >= p.items ? -infinity() : 0.0f, reward = 0.0f;
  if (item < p.items) {
    if (p.item_bias != nullptr) bias = to_float(static_cast<const T*>(p.item_bias)[item]) * unit;
    if (p.reward_bias != nullptr) reward = to_float(static_cast<const T*>(p.reward_bias)[item]);
  }
  vectors[i] = bias;
  vectors[kBlockN + i] = reward;
}

// By all threads of a block.
template <class T>
OFFTOWER_DEVICE void load_item_biases(const PolicyParams& p, int64_t first, float* vectors,
                                      float unit) {
  constexpr int kBlockN = kBlockNOf<T>;
  for (int i = thread_idx(); i < kBlockN; i += block_dim())
    load_item_bias<T, kBlockN>(p, first, i, vectors, unit);
}

// By one warp, bfloat16.
template <int kBlockN>
OFFTOWER_DEVICE void warp_load_item_biases(const PolicyParams& p, int64_t first, float* vectors) {
  static_assert(kBlockN % 32 == 0, "every lane loads the same number of columns");
  OFFTOWER_UNROLL
  for (int part = 0; part < kBlockN; part += 32)
    load_item_bias<Bfloat16, kBlockN>(p, first, part + lane_idx(), vectors, kLog2E);
}

} // namespace offtower::cuda
