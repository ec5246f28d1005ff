// The operands as kernels see them, and how a block keeps its tiles in shared memory.
//
// A block keeps some rows of one matrix, the "stay" side, and lets tiles of the other, the "stream"
// side, pass by. Forward and du: contexts stay. dv: items stay. Scores are in units of log 2:
// y_ij = <u_i, v_j> log2(e) / temperature + b_j log2(e), so that an exponential is one instruction.
#pragma once

#include "../simt/simt.h"

namespace offtower::cuda {

enum class Reward : int { none, dense, factored };

// Row-major, contiguous; rows start on 16 bytes, so the width is a multiple of 16 bytes.
struct Matrix {
  const void* data;
  int64_t rows;
  int width;
};

struct Problem {
  Matrix stay, stream;
  Matrix reward_stay, reward_stream; // of a factored reward model
  const void* item_bias;             // of the operands' type, or null
  const void* reward_bias;           // likewise
  const void* dense;                 // (contexts, items)
  int64_t items;
  float scale; // log2(e) / temperature
  bool sigmoid;
  int splits; // of the stream
  int stages; // tiles in flight, 1 or 2
};

template <class T>
struct Tiling;
template <>
struct Tiling<Bfloat16> {
  static constexpr int kColumns = 64; // stream rows a tile
};
template <>
struct Tiling<float> {
  static constexpr int kColumns = 32;
};
template <>
struct Tiling<Tfloat32> {
  static constexpr int kColumns = 32;
};

constexpr int kStep = 32;      // bytes of a row that one step of a product takes
constexpr int kRowStats = 8;   // 32-bit words of a context, see RowStat
constexpr int kWarpRows = 16;  // rows of a warp's fragment

// What the gradient needs of a context, one array each.
enum RowStat {
  kAnchorStat,
  kBaseStat,
  kRewardStat,
  kExpectedStat,
  kEntropyStat,
  kLogTotalStat,
  kOwnStat,
  kActionStat
};

// Bytes from one row to the next: an odd multiple of 16, so that eight rows' 16-byte pieces lie in
// different banks.
OFFTOWER_BOTH constexpr int pitch(int width, int element) {
  return static_cast<int>(ceil_div(static_cast<int64_t>(width) * element, kStep)) * kStep + 16;
}

// Offsets in shared memory. A stage is a stream tile, its reward tile, and kVectors words a column.
struct SharedLayout {
  int stay_pitch, reward_pitch; // of both sides: products need equal widths
  int stay, reward_stay, stages, stage_bytes;
  int reward_stream, vectors; // within a stage
  int scratch, bytes;
};

// `width`: of embeddings, padded; `scratch`: bytes a warp.
OFFTOWER_BOTH constexpr SharedLayout shared_layout(int element, int columns, int rows, int width,
                                                   int reward_width, int vectors, int stages,
                                                   int scratch, int warps) {
  SharedLayout l{};
  l.stay_pitch = pitch(width, element);
  l.reward_pitch = reward_width == 0 ? 0 : pitch(reward_width, element);
  l.stay = 0;
  l.reward_stay = rows * l.stay_pitch;
  l.stages = l.reward_stay + rows * l.reward_pitch;
  l.reward_stream = columns * l.stay_pitch;
  l.vectors = l.reward_stream + columns * l.reward_pitch;
  l.stage_bytes = l.vectors + vectors * columns * 4;
  l.scratch = l.stages + stages * l.stage_bytes;
  l.bytes = l.scratch + warps * scratch;
  return l;
}

// Tiles [begin, end) of split `k` of `splits`.
OFFTOWER_BOTH constexpr int64_t split_begin(int64_t tiles, int splits, int k) {
  return tiles * k / splits;
}

// Rows first .. first + count - 1 of a matrix to shared memory; zeros beyond its rows and its width.
template <class T>
OFFTOWER_DEVICE void load_rows(const Matrix& m, int64_t first, int count, char* shared, int to_pitch) {
  const int pieces = (to_pitch - 16) / 16, filled = m.width * static_cast<int>(sizeof(T)) / 16;
  const char* source = static_cast<const char*>(m.data);
  for (int i = thread_index(); i < count * pieces; i += thread_count()) {
    const int row = i / pieces, piece = i % pieces;
    const bool inside = first + row < m.rows && piece < filled;
    const int64_t from = inside ? ((first + row) * filled + piece) * 16 : 0;
    copy_async(shared + row * to_pitch + piece * 16, source + from, inside);
  }
}

} // namespace offtower::cuda
