// Operands as the kernels take them, and the sizes of tiles.
//
// A block keeps rows of one matrix in shared memory (the resident tile) while tiles of the other matrix
// are streamed past it. Forward and du: contexts resident, items streamed. dv: items resident, contexts
// streamed. Scores are in units of log 2, y_ij = log2(e) (<u_i, v_j> / temperature + b_j), so that
// exp(s) is one ex2.
#pragma once

#include "../ptx/ptx.h"

namespace offtower::cuda {

enum class Reward : int { none, dense, factored };

// Row-major and contiguous; rows start on 16 bytes, the unit of cp.async and TMA.
struct Matrix {
  const void* data;
  int64_t rows;
  int width;
};

struct PolicyParams {
  Matrix resident, streamed;
  Matrix reward_resident, reward_streamed; // of a factored reward model
  const void* item_bias;                   // of the operands' type, or null
  const void* reward_bias;                 // likewise
  const void* dense;                       // (contexts, items)
  int64_t items;
  float scale; // log2(e) / temperature
  bool sigmoid;
  int splits; // of the streamed matrix
  int stages; // streamed tiles in shared memory
};

// Rows from first_row on of the resident matrix, against tiles [begin, end) of the streamed one.
struct WorkTile {
  int64_t first_row, begin, end;
  int split;
};

// Work tiles of one split are consecutive: blocks that run together stream the same tiles through L2.
OFFTOWER_DEVICE WorkTile work_tile(const PolicyParams& p, int64_t number, int block_m,
                                   int block_n) {
  const int64_t groups = ceil_div(p.resident.rows, block_m),
                tiles = ceil_div(p.streamed.rows, block_n);
  const int split = static_cast<int>(number / groups);
  return {number % groups * block_m, tiles * split / p.splits, tiles * (split + 1) / p.splits,
          split};
}

// Streamed rows a tile of the portable kernels.
template <class T>
constexpr int kBlockNOf = sizeof(T) == 2 ? 64 : 32;

constexpr int kStepBytes = 32; // of a row, the depth of one mma: 16 bfloat16 or 8 float32
constexpr int kAtomM = 16;     // rows of an mma.m16n8 fragment

// What the backward pass reads of each context: kRowStats arrays of 32-bit words.
enum RowStat {
  kReferenceMaxStat,
  kBaseStat,
  kRewardStat,
  kExpectedStat,
  kEntropyStat,
  kLogTotalStat,
  kTargetStat, // cotangent of log_prob
  kActionStat
};
constexpr int kRowStats = 8;
constexpr int kContextPadding = 128; // the arrays are padded, so that the last tile is read whole

} // namespace offtower::cuda
