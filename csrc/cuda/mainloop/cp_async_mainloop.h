// The portable mainloop: streamed tiles pass through one or two stages of shared memory (cp.async).
#pragma once

#include "item_biases.h"
#include "shared_layout.h"

namespace offtower::cuda {

// `count` rows from `first` on to shared memory; zeros outside the matrix.
template <class T>
OFFTOWER_DEVICE void load_rows(const Matrix& m, int64_t first, int count, char* shared,
                               int to_pitch) {
  const int chunks = (to_pitch - 16) / 16, filled = m.width * static_cast<int>(sizeof(T)) / 16;
  const char* source = static_cast<const char*>(m.data);
  for (int i = thread_idx(); i < count * chunks; i += block_dim()) {
    const int row = i / chunks, chunk = i % chunks;
    const bool inside = first + row < m.rows && chunk < filled;
    const int64_t from = inside ? ((first + row) * filled + chunk) * 16 : 0;
    cp_async_zfill(shared + row * to_pitch + chunk * 16, source + from, inside);
  }
}

// Calls `load_vectors(first streamed row, words)` to fill the vectors of each stage, then
// `compute(first streamed row, stage)`.
template <class T, class LoadVectors, class Compute>
OFFTOWER_DEVICE void cp_async_mainloop(const PolicyParams& p, const SharedLayout& l,
                                       const WorkTile& work, int block_m, char* shared,
                                       LoadVectors load_vectors, Compute compute) {
  constexpr int kBlockN = kBlockNOf<T>;
  const auto load = [&](int64_t tile) {
    char* stage = shared + l.stages + (tile - work.begin) % p.stages * l.stage_bytes;
    load_rows<T>(p.streamed, tile * kBlockN, kBlockN, stage, l.resident_pitch);
    if (l.reward_pitch != 0)
      load_rows<T>(p.reward_streamed, tile * kBlockN, kBlockN, stage + l.reward_streamed,
                   l.reward_pitch);
    load_vectors(tile * kBlockN, reinterpret_cast<float*>(stage + l.vectors));
  };
  if (work.begin >= work.end) return;
  load_rows<T>(p.resident, work.first_row, block_m, shared + l.resident, l.resident_pitch);
  if (l.reward_pitch != 0)
    load_rows<T>(p.reward_resident, work.first_row, block_m, shared + l.reward_resident,
                 l.reward_pitch);
  load(work.begin);
  cp_async_commit_group();
  for (int64_t tile = work.begin; tile < work.end; ++tile) {
    const bool more = tile + 1 < work.end;
    if (more && p.stages == 2) {
      load(tile + 1);
      cp_async_commit_group();
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    syncthreads();
    compute(tile * kBlockN, shared + l.stages + (tile - work.begin) % p.stages * l.stage_bytes);
    syncthreads();
    if (more && p.stages == 1) {
      load(tile + 1);
      cp_async_commit_group();
    }
  }
}

} // namespace offtower::cuda
