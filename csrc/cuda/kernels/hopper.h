// How Hopper's kernels pass their tiles: one warp has the copy engine fill stages of shared memory,
// two warpgroups with 64 rows each work on them, and barriers in shared memory hand stages to and fro.
//
// A block takes pieces of work (rows that stay, split of the stream) one after the other, and the
// producer runs ahead into the next piece.
#pragma once

#include "../plan.h"
#include "../simt/hopper.h"
#include "products.h"

namespace offtower::cuda {

// `Rows`: ForwardProblem or GradientProblem.
template <class Rows>
struct HopperProblem {
  TensorMap stay, stream, reward_stay, reward_stream;
  Rows rows;
  int panels, reward_panels; // of 64 numbers
  int stay_stages;
  int64_t works;
};

constexpr int kHopperThreads = 384;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
// A block starts with 168 a thread, the most that 384 threads can have; warpgroups may only pass on what
// the others have given, in eights.
static_assert(kProducerRegisters * 128 + kConsumerRegisters * 256 <= 168 * kHopperThreads);
static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0 && kConsumerRegisters < 256);

// A place in a ring of stages, and the parity of its turn.
struct Ring {
  int stages, at = 0, turn = 0;
  OFFTOWER_DEVICE explicit Ring(int count) : stages(count) {}
  OFFTOWER_DEVICE void next() {
    if (++at == stages) {
      at = 0;
      turn ^= 1;
    }
  }
};

// One piece of work.
struct Work {
  int64_t first_row, begin, end; // row that stays, tiles of the stream
  int split;
};

template <class Rows, int kColumns, int kVectors>
class Pipeline {
public:
  OFFTOWER_DEVICE Pipeline(const HopperProblem<Rows>& problem, char* shared_memory)
      : p(problem), o(problem.rows.policy), shared(shared_memory),
        l(hopper_layout(kColumns, problem.panels, problem.reward_panels, kVectors,
                        problem.stay_stages, o.stages)),
        stay(problem.stay_stages), stream(o.stages) {}

  // By all threads, before any other use.
  OFFTOWER_DEVICE void start() {
    if (thread_index() == 0) {
      constexpr int kConsumerWarps = 8;
      for (int i = 0; i < p.stay_stages; ++i) {
        init_barrier(full_stay(i), 1);
        init_barrier(free_stay(i), kConsumerWarps);
      }
      for (int i = 0; i < o.stages; ++i) {
        init_barrier(full(i), 2); // the copies' expectation, and the vectors
        init_barrier(free(i), kConsumerWarps);
      }
      publish_barriers();
    }
    sync_block();
  }

  OFFTOWER_DEVICE Work work(int64_t number) const {
    const int64_t groups = ceil_div(o.stay.rows, kHopperRows);
    const int64_t tiles = ceil_div(o.stream.rows, kColumns);
    const int split = static_cast<int>(number / groups);
    return {number % groups * kHopperRows, split_begin(tiles, o.splits, split),
            split_begin(tiles, o.splits, split + 1), split};
  }

  // The producer's warp: `vectors(first, shared words, barrier)` fills what a tile needs beside its
  // rows, by all lanes or by copies of `vector_bytes`.
  template <class Vectors>
  OFFTOWER_DEVICE void produce(int vector_bytes, Vectors vectors) {
    for (int64_t number = block_index(); number < p.works; number += block_count()) {
      const Work w = work(number);
      wait_barrier(free_stay(stay.at), stay.turn ^ 1);
      if (lane_index() == 0) {
        char* const to = shared + stay.at * l.stay_bytes;
        arrive_expecting(full_stay(stay.at), l.stay_bytes);
        boxes(to, &p.stay, p.panels, kHopperRows, w.first_row, full_stay(stay.at));
        boxes(to + l.reward_stay, &p.reward_stay, p.reward_panels, kHopperRows, w.first_row,
              full_stay(stay.at));
      }
      stay.next();
      for (int64_t tile = w.begin; tile < w.end; ++tile, stream.next()) {
        uint64_t* const barrier = full(stream.at);
        char* const to = stage();
        const int64_t first = tile * kColumns;
        wait_barrier(free(stream.at), stream.turn ^ 1);
        if (lane_index() == 0) {
          arrive_expecting(barrier, l.vectors + vector_bytes);
          boxes(to, &p.stream, p.panels, kColumns, first, barrier);
          boxes(to + l.reward_stream, &p.reward_stream, p.reward_panels, kColumns, first, barrier);
        }
        sync_warp(); // no copy lands before it is expected
        vectors(first, reinterpret_cast<float*>(to + l.vectors), barrier);
        sync_warp();
        if (lane_index() == 0) arrive(barrier);
      }
    }
  }

  // The consumers' side of the rings.
  OFFTOWER_DEVICE void wait_stay() { wait_barrier(full_stay(stay.at), stay.turn); }
  OFFTOWER_DEVICE void release_stay() {
    sync_warp();
    if (lane_index() == 0) arrive(free_stay(stay.at));
    stay.next();
  }
  OFFTOWER_DEVICE void wait_stage() { wait_barrier(full(stream.at), stream.turn); }
  OFFTOWER_DEVICE void release_stage(int at) {
    sync_warp();
    if (lane_index() == 0) arrive(free(at));
  }
  OFFTOWER_DEVICE char* stage() const { return stage(stream.at); }
  OFFTOWER_DEVICE char* stage(int at) const { return shared + l.stages + at * l.stage_bytes; }
  OFFTOWER_DEVICE const float* vectors(int at) const {
    return reinterpret_cast<const float*>(stage(at) + l.vectors);
  }

  // y = X Y^T of the warpgroup's rows and the current stage; with rewards also q. Started, not waited
  // for.
  template <int kTiles, int kRewardTiles>
  OFFTOWER_DEVICE void start_scores(int first_row, float (&y)[kTiles][4], float (&q)[kRewardTiles][4]) {
    const uint32_t x = shared_address(shared + stay.at * l.stay_bytes), s = shared_address(stage());
    product(x, s, first_row, o.stay.width, y);
    if constexpr (kRewardTiles > 1)
      product(x + static_cast<uint32_t>(l.reward_stay), s + static_cast<uint32_t>(l.reward_stream),
              first_row, o.reward_stay.width, q);
  }

  const HopperProblem<Rows>& p;
  const Problem& o;
  char* const shared;
  const HopperLayout l;
  Ring stay, stream;

private:
  OFFTOWER_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(shared + l.barriers) + i;
  }
  OFFTOWER_DEVICE uint64_t* full(int i) const { return barrier(2 * i); }
  OFFTOWER_DEVICE uint64_t* free(int i) const { return barrier(2 * i + 1); }
  OFFTOWER_DEVICE uint64_t* full_stay(int i) const { return barrier(2 * (o.stages + i)); }
  OFFTOWER_DEVICE uint64_t* free_stay(int i) const { return barrier(2 * (o.stages + i) + 1); }

  static OFFTOWER_DEVICE void boxes(char* to, const TensorMap* map, int panels, int rows,
                                    int64_t first, uint64_t* barrier) {
    for (int panel = 0; panel < panels; ++panel)
      copy_box(to + panel * rows * kPanelBytes, map, panel * kPanelWidth, static_cast<int>(first),
               barrier);
  }

  template <int kTiles>
  static OFFTOWER_DEVICE void product(uint32_t x, uint32_t y, int first_row, int width,
                                      float (&sum)[kTiles][4]) {
    // Whole panels: beyond the width they are zeros.
    x += static_cast<uint32_t>(first_row * kPanelBytes);
    OFFTOWER_UNROLL
    for (int step = 0; step < 4; ++step) {
      if (step == 0) start_group_scores(sum, rows_descriptor(x, step), rows_descriptor(y, step));
      else add_group_scores(sum, rows_descriptor(x, step), rows_descriptor(y, step));
    }
    for (int left = width - kPanelWidth; left > 0; left -= kPanelWidth) {
      x += kHopperRows * kPanelBytes;
      y += kColumns * kPanelBytes;
      OFFTOWER_UNROLL
      for (int step = 0; step < 4; ++step)
        add_group_scores(sum, rows_descriptor(x, step), rows_descriptor(y, step));
    }
  }
};

// Biases of the items of a tile, as load_item_biases of the portable kernels, by one warp.
template <int kColumns>
OFFTOWER_DEVICE void item_biases_by_warp(const Problem& p, int64_t first, float* vectors) {
  OFFTOWER_UNROLL
  for (int part = 0; part < kColumns; part += 32) {
    const int i = part + lane_index();
    const int64_t item = first + i;
    float bias = item >= p.items ? -infinity() : 0.0f, reward = 0.0f;
    if (item < p.items) {
      if (p.item_bias != nullptr)
        bias = to_float(static_cast<const Bfloat16*>(p.item_bias)[item]) * kLog2E;
      if (p.reward_bias != nullptr)
        reward = to_float(static_cast<const Bfloat16*>(p.reward_bias)[item]);
    }
    vectors[i] = bias;
    vectors[kColumns + i] = reward;
  }
}

} // namespace offtower::cuda
