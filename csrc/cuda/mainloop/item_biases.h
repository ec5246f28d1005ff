// Biases of streamed items: logit biases, then those of a factored reward model.
#pragma once

#include "../kernels/params.h"

namespace offtower::cuda {

struct ItemBias {
  float logit, reward;
};

// Logit biases are multiplied by `unit`, and are -inf beyond the last item, which masks the padding of the
// last tile.
template <class T>
OFFTOWER_DEVICE ItemBias item_bias(const PolicyParams& p, int64_t item, float unit) {
  ItemBias bias{item >= p.items ? -infinity() : 0.0f, 0.0f};
  if (item < p.items) {
    if (p.item_bias != nullptr)
      bias.logit = to_float(static_cast<const T*>(p.item_bias)[item]) * unit;
    if (p.reward_bias != nullptr)
      bias.reward = to_float(static_cast<const T*>(p.reward_bias)[item]);
  }
  return bias;
}

// By all threads of a block.
template <class T>
OFFTOWER_DEVICE void load_item_biases(const PolicyParams& p, int64_t first, float* vectors,
                                      float unit) {
  constexpr int kBlockN = kBlockNOf<T>;
  for (int i = thread_idx(); i < kBlockN; i += block_dim()) {
    const ItemBias bias = item_bias<T>(p, first + i, unit);
    vectors[i] = bias.logit;
    vectors[kBlockN + i] = bias.reward;
  }
}

// By one warp, bfloat16. The next tile's biases are read as soon as this one's are stored, so that their
// latency passes while the warp waits for an empty stage.
template <int kBlockN>
class ItemBiasPrefetch {
public:
  static_assert(kBlockN % 32 == 0, "every lane loads the same number of columns");
  OFFTOWER_DEVICE explicit ItemBiasPrefetch(const PolicyParams& params) : p(params) {}

  OFFTOWER_DEVICE void store(int64_t first, float* vectors) {
    if (first != fetched) fetch(first); // of a work tile's first tile
    OFFTOWER_UNROLL
    for (int part = 0; part < kBlockN / 32; ++part) {
      vectors[part * 32 + lane_idx()] = bias[part].logit;
      vectors[kBlockN + part * 32 + lane_idx()] = bias[part].reward;
    }
    fetch(first + kBlockN);
  }

private:
  OFFTOWER_DEVICE void fetch(int64_t first) {
    fetched = first;
    OFFTOWER_UNROLL
    for (int part = 0; part < kBlockN / 32; ++part)
      bias[part] = item_bias<Bfloat16>(p, first + part * 32 + lane_idx(), kLog2E);
  }

  const PolicyParams& p;
  int64_t fetched = -1;
  ItemBias bias[kBlockN / 32];
};

} // namespace offtower::cuda
