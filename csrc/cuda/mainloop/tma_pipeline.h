// Hopper's mainloop: warp-specialized, persistent blocks. One producer warp fills stages of shared memory
// by TMA; two consumer warpgroups with 64 rows each work on them. Full and empty mbarriers hand stages
// over. The producer runs ahead into the next work tile.
#pragma once

#include "../ptx/sm90.h"
#include "item_biases.h"
#include "shared_layout.h"

namespace offtower::cuda {

// `Params` are ForwardParams or GradientParams.
template <class Params>
struct HopperParams {
  TensorMap resident, streamed, reward_resident, reward_streamed;
  Params params;
  int panels, reward_panels;
  int resident_stages;
  int64_t work_tiles;
};

constexpr int kHopperThreads = 384, kConsumerWarps = 8;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(
    kProducerRegisters * 128 + kConsumerRegisters * 256 <= 168 * kHopperThreads,
    "a block of 384 threads starts with 168 registers a thread (65,536 / 384, in eights)");
static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0 &&
                  kConsumerRegisters <= 256,
              "setmaxnreg takes multiples of 8 up to 256");
static_assert(kHopperBlockM == kConsumerWarps / 4 * 64, "wgmma has 64 rows");

// A stage of a circular buffer, and the parity of its barriers' phase.
struct PipelineState {
  int stages, index = 0, phase = 0;
  OFFTOWER_DEVICE explicit PipelineState(int count) : stages(count) {}
  OFFTOWER_DEVICE void advance() {
    if (++index == stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

template <class Params, int kBlockN, int kColumnVectors>
class TmaPipeline {
public:
  static_assert(kBlockN % 8 == 0, "panels start on a swizzle atom of 8 rows");
  static_assert(kBlockN <= 256, "a TMA box has at most 256 rows");

  OFFTOWER_DEVICE TmaPipeline(const HopperParams<Params>& hopper, char* shared_memory)
      : p(hopper), o(hopper.params.policy), shared(shared_memory),
        l(hopper_layout({kBlockN, hopper.panels, hopper.reward_panels, kColumnVectors},
                        hopper.resident_stages, o.stages)),
        resident(hopper.resident_stages), streamed(o.stages) {}

  // By all threads, before any other use.
  OFFTOWER_DEVICE void init_barriers() {
    if (thread_idx() == 0) {
      for (int i = 0; i < p.resident_stages; ++i) {
        mbarrier_init(full_resident(i), 1);
        mbarrier_init(empty_resident(i), kConsumerWarps);
      }
      for (int i = 0; i < o.stages; ++i) {
        mbarrier_init(full(i), 2); // expect_tx of the tiles, and the vectors
        mbarrier_init(empty(i), kConsumerWarps);
      }
      fence_barrier_init();
    }
    syncthreads();
  }

  OFFTOWER_DEVICE WorkTile work(int64_t number) const {
    return work_tile(o, number, kHopperBlockM, kBlockN);
  }

  // By the producer warp. `load_vectors(first streamed row, words, barrier)` fills the vectors of each
  // stage, with plain stores or with bulk copies of `vector_bytes` in all.
  template <class LoadVectors>
  OFFTOWER_DEVICE void produce(int vector_bytes, LoadVectors load_vectors) {
    for (int64_t number = block_idx(); number < p.work_tiles; number += grid_dim()) {
      const WorkTile w = work(number);
      mbarrier_wait(empty_resident(resident.index), resident.phase ^ 1);
      if (lane_idx() == 0) {
        char* const to = shared + resident.index * l.resident_bytes;
        mbarrier_arrive_expect_tx(full_resident(resident.index), l.resident_bytes);
        load_panels(to, &p.resident, p.panels, kHopperBlockM, w.first_row,
                    full_resident(resident.index));
        load_panels(to + l.reward_resident, &p.reward_resident, p.reward_panels, kHopperBlockM,
                    w.first_row, full_resident(resident.index));
      }
      resident.advance();
      for (int64_t tile = w.begin; tile < w.end; ++tile, streamed.advance()) {
        uint64_t* const barrier = full(streamed.index);
        char* const to = stage();
        const int64_t first = tile * kBlockN;
        mbarrier_wait(empty(streamed.index), streamed.phase ^ 1);
        if (lane_idx() == 0) {
          mbarrier_arrive_expect_tx(barrier, l.vectors + vector_bytes);
          load_panels(to, &p.streamed, p.panels, kBlockN, first, barrier);
          load_panels(to + l.reward_streamed, &p.reward_streamed, p.reward_panels, kBlockN, first,
                      barrier);
        }
        syncwarp(); // no bulk copy may complete before its bytes are expected
        load_vectors(first, reinterpret_cast<float*>(to + l.vectors), barrier);
        syncwarp();
        if (lane_idx() == 0) mbarrier_arrive(barrier);
      }
    }
  }

  // By the consumer warps.
  OFFTOWER_DEVICE void wait_resident() {
    mbarrier_wait(full_resident(resident.index), resident.phase);
  }
  OFFTOWER_DEVICE void release_resident() {
    syncwarp();
    if (lane_idx() == 0) mbarrier_arrive(empty_resident(resident.index));
    resident.advance();
  }
  OFFTOWER_DEVICE void wait_stage() { mbarrier_wait(full(streamed.index), streamed.phase); }
  OFFTOWER_DEVICE void release_stage(int index) {
    syncwarp();
    if (lane_idx() == 0) mbarrier_arrive(empty(index));
  }
  OFFTOWER_DEVICE char* stage() const { return stage(streamed.index); }
  OFFTOWER_DEVICE const float* vectors(int index) const {
    return reinterpret_cast<const float*>(stage(index) + l.vectors);
  }

  // Issues y = X Y^T of the warpgroup's rows and the current stage; with rewards also q.
  template <int kMmaN, int kRewardMmaN>
  OFFTOWER_DEVICE void issue_score_gemm(int first_row, float (&y)[kMmaN][4],
                                        float (&q)[kRewardMmaN][4]) {
    const uint32_t x = gmma_address(shared + resident.index * l.resident_bytes),
                   s = gmma_address(stage());
    issue_gemm(x, s, first_row, o.resident.width, y);
    if constexpr (kRewardMmaN > 1)
      issue_gemm(x + static_cast<uint32_t>(l.reward_resident),
                 s + static_cast<uint32_t>(l.reward_streamed), first_row, o.reward_resident.width,
                 q);
  }

  const HopperParams<Params>& p;
  const PolicyParams& o;
  char* const shared;
  const HopperLayout l;
  PipelineState resident, streamed;

private:
  OFFTOWER_DEVICE char* stage(int index) const { return shared + l.stages + index * l.stage_bytes; }
  OFFTOWER_DEVICE uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(shared + l.barriers) + i;
  }
  OFFTOWER_DEVICE uint64_t* full(int i) const { return barrier(2 * i); }
  OFFTOWER_DEVICE uint64_t* empty(int i) const { return barrier(2 * i + 1); }
  OFFTOWER_DEVICE uint64_t* full_resident(int i) const { return barrier(2 * (o.stages + i)); }
  OFFTOWER_DEVICE uint64_t* empty_resident(int i) const { return barrier(2 * (o.stages + i) + 1); }

  static OFFTOWER_DEVICE void load_panels(char* to, const TensorMap* map, int panels, int rows,
                                          int64_t first, uint64_t* barrier) {
    for (int panel = 0; panel < panels; ++panel)
      tma_load(to + panel * rows * kPanelBytes, map, panel * kPanelWidth, static_cast<int>(first),
               barrier);
  }

  // Whole panels: TMA filled them with zeros beyond the width.
  template <int kMmaN>
  static OFFTOWER_DEVICE void issue_gemm(uint32_t x, uint32_t y, int first_row, int width,
                                         float (&sum)[kMmaN][4]) {
    x += static_cast<uint32_t>(first_row * kPanelBytes);
    OFFTOWER_UNROLL
    for (int k = 0; k < kPanelWidth / 16; ++k) {
      if (k == 0)
        wgmma_ss_zero(sum, k_major_desc(x, k), k_major_desc(y, k));
      else
        wgmma_ss(sum, k_major_desc(x, k), k_major_desc(y, k));
    }
    for (int left = width - kPanelWidth; left > 0; left -= kPanelWidth) {
      x += kHopperBlockM * kPanelBytes;
      y += kBlockN * kPanelBytes;
      OFFTOWER_UNROLL
      for (int k = 0; k < kPanelWidth / 16; ++k)
        wgmma_ss(sum, k_major_desc(x, k), k_major_desc(y, k));
    }
  }
};

} // namespace offtower::cuda
