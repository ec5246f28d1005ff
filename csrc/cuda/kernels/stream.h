// Tiles of the stream side passing through shared memory, one or two in flight.
#pragma once

#include "products.h"

namespace offtower::cuda {

// The part of a problem that one block works on.
struct Share {
  int64_t first_row;        // on the stay side
  int64_t begin, end;       // tiles of the stream
  int split;
};

// Blocks of one split follow each other, so that those that run together read the same tiles.
template <class T>
OFFTOWER_DEVICE Share share_of_block(const Problem& p, int rows) {
  const int64_t blocks = ceil_div(p.stay.rows, rows);
  const int split = static_cast<int>(block_index() / blocks);
  const int64_t tiles = ceil_div(p.stream.rows, Tiling<T>::kColumns);
  return {block_index() % blocks * rows, split_begin(tiles, p.splits, split),
          split_begin(tiles, p.splits, split + 1), split};
}

// Calls `vectors(first stream row, shared words of the stage)` for what a tile needs beside its
// rows, and `compute(first stream row, shared stage)`.
template <class T, class Vectors, class Compute>
OFFTOWER_DEVICE void for_each_tile(const Problem& p, const SharedLayout& l, const Share& share,
                                   int rows, char* shared, Vectors vectors, Compute compute) {
  constexpr int kColumns = Tiling<T>::kColumns;
  const auto load = [&](int64_t tile) {
    char* stage = shared + l.stages + (tile - share.begin) % p.stages * l.stage_bytes;
    load_rows<T>(p.stream, tile * kColumns, kColumns, stage, l.stay_pitch);
    if (l.reward_pitch != 0)
      load_rows<T>(p.reward_stream, tile * kColumns, kColumns, stage + l.reward_stream, l.reward_pitch);
    vectors(tile * kColumns, reinterpret_cast<float*>(stage + l.vectors));
  };
  if (share.begin >= share.end) return;
  load_rows<T>(p.stay, share.first_row, rows, shared + l.stay, l.stay_pitch);
  if (l.reward_pitch != 0)
    load_rows<T>(p.reward_stay, share.first_row, rows, shared + l.reward_stay, l.reward_pitch);
  load(share.begin);
  commit_copies();
  for (int64_t tile = share.begin; tile < share.end; ++tile) {
    const bool more = tile + 1 < share.end;
    if (more && p.stages == 2) {
      load(tile + 1);
      commit_copies();
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    sync_block();
    compute(tile * kColumns, shared + l.stages + (tile - share.begin) % p.stages * l.stage_bytes);
    sync_block();
    if (more && p.stages == 1) {
      load(tile + 1);
      commit_copies();
    }
  }
}

// Of items on the stream side: their bias times `unit`, -inf beyond the last item, and that of a
// factored reward model.
template <class T>
OFFTOWER_DEVICE void load_item_biases(const Problem& p, int64_t first, float* vectors, float unit) {
  constexpr int kColumns = Tiling<T>::kColumns;
  for (int i = thread_index(); i < kColumns; i += thread_count()) {
    const int64_t item = first + i;
    float bias = 0.0f, reward = 0.0f;
    if (item >= p.items) bias = -infinity();
    else {
      if (p.item_bias != nullptr)
        bias = to_float(static_cast<const T*>(p.item_bias)[item]) * unit;
      if (p.reward_bias != nullptr) reward = to_float(static_cast<const T*>(p.reward_bias)[item]);
    }
    vectors[i] = bias;
    vectors[kColumns + i] = reward;
  }
}

} // namespace offtower::cuda
