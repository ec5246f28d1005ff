// The operations of ../ptx/sm80.h on the emulated block: the semantics of each PTX instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#define OFFTOWER_DEVICE inline
#define OFFTOWER_BOTH inline
#define OFFTOWER_UNROLL

namespace offtower::cuda {

inline int thread_idx() { return emulation::thread_idx(); }
inline int block_dim() { return emulation::block_dim(); }
inline int64_t block_idx() { return emulation::block_idx(); }
inline int64_t grid_dim() { return emulation::grid_dim(); }

namespace emulation {
// .aligned instructions are undefined in a warp that has diverged.
inline void check_converged(const char* what) {
  if (diverged())
    fail(std::string(what) + " in a warp that may have diverged: syncwarp is missing before it");
}

// Runs `combine` once, on the arguments of all 32 lanes of this thread's warp, which it reconverges.
template <class Args>
void in_warp(const char* what, Args& args, void (*combine)(Args* const* lanes)) {
  struct Lane {
    Args* args;
    void (*combine)(Args* const*);
  } mine{&args, combine};
  collective(what, thread_idx() / 32 * 32, 32, &mine, [](void* const* all, int) {
    Args* lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<Lane*>(all[lane])->args;
    static_cast<Lane*>(all[0])->combine(lanes);
  });
  set_diverged(false);
}
} // namespace emulation

inline void mark_divergence() { emulation::set_diverged(true); }

inline float uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline void syncthreads() {
  if (emulation::omitted("syncthreads")) return;
  emulation::collective("syncthreads", 0, block_dim(), nullptr, nullptr);
  emulation::set_diverged(false);
}
inline void syncwarp() {
  if (emulation::omitted("syncwarp")) return;
  int nothing = 0;
  emulation::in_warp<int>("syncwarp", nothing, [](int* const*) {});
}
inline uint32_t ballot_sync(bool x) {
  uint32_t value = x;
  emulation::in_warp<uint32_t>("ballot", value, [](uint32_t* const* lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= *lanes[lane] << lane;
    for (int lane = 0; lane < 32; ++lane) *lanes[lane] = all;
  });
  return value;
}
template <class T>
T shfl_xor_sync(T x, int mask) {
  struct Args {
    T value;
    int mask;
  } args{x, mask};
  emulation::in_warp<Args>("shfl_xor_sync", args, [](Args* const* lanes) {
    T before[32];
    for (int lane = 0; lane < 32; ++lane) before[lane] = lanes[lane]->value;
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->value = before[lane ^ lanes[lane]->mask];
  });
  return args.value;
}
inline int atomic_add(int* shared, int amount) {
  const int before = *shared;
  *shared += amount;
  return before;
}
inline int count_trailing_zeros(uint32_t x) { return __builtin_ctz(x); }

inline int prevent_hoisting(int x) { return x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min_nan(float a, float b) { return a != a || b != b ? a + b : a < b ? a : b; }
inline float ex2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }

inline uint32_t round_to_bf16(float x) {
  const uint32_t bits = float_as_uint(x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t cvt_bf16x2(float low, float high) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}

namespace emulation {
struct Matrices {
  uint32_t* r;
  const uint16_t* row;
};
// Eight rows of 16 bytes are read at once and must lie in different banks: different eighths of 128 bytes.
inline void check_banks(Matrices* const* lanes) {
  for (int first = 0; first < 32; first += 8) {
    int seen = 0;
    for (int lane = first; lane < first + 8; ++lane)
      seen |= 1 << reinterpret_cast<uintptr_t>(lanes[lane]->row) / 16 % 8;
    if (seen != 0xff) fail("ldmatrix: rows lie in the same banks");
  }
}
// Lane l receives elements (l / 4, 2 (l % 4)) and the next of each matrix, or of its transpose.
template <bool kTransposed>
void spread_matrices(Matrices* const* lanes) {
  check_banks(lanes);
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t first = kTransposed ? lanes[m * 8 + j]->row[i] : lanes[m * 8 + i]->row[j];
      const uint32_t second =
          kTransposed ? lanes[m * 8 + j + 1]->row[i] : lanes[m * 8 + i]->row[j + 1];
      lanes[lane]->r[m] = first | second << 16;
    }
}
template <bool kTransposed>
void load_spread(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("ldmatrix: a row is not aligned to 16 bytes");
  Matrices args{r, static_cast<const uint16_t*>(row)};
  check_converged("ldmatrix");
  in_warp<Matrices>("ldmatrix", args, spread_matrices<kTransposed>);
}
inline float half_of(uint32_t pair, int which) {
  return uint_as_float(which == 0 ? pair << 16 : pair & 0xffff0000u);
}
} // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::load_spread<false>(r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulation::load_spread<true>(r, row);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16": with g = lane / 4 and t = lane % 4, a0..a3 are rows
// (g, g+8, g, g+8), columns 2t (+8 for a2, a3); b0, b1 are rows 2t (+8), column g; d0..d3 are rows
// (g, g, g+8, g+8), columns 2t and 2t+1.
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Args {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } args{d, a, {b0, b1}};
  emulation::check_converged("mma");
  emulation::in_warp<Args>("mma", args, [](Args* const* lanes) {
    float x[16][16], y[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 8; ++e)
        x[g + e / 2 % 2 * 8][2 * t + e % 2 + e / 4 * 8] =
            emulation::half_of(lanes[lane]->a[e / 2], e % 2);
      for (int e = 0; e < 4; ++e)
        y[2 * t + e % 2 + e / 2 * 8][g] = emulation::half_of(lanes[lane]->b[e / 2], e % 2);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        double sum = lanes[lane]->d[e];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[row][k]) * y[k][column];
        lanes[lane]->d[e] = static_cast<float>(sum);
      }
  });
}

// cvt.rna.tf32 drops 13 bits, rounding to nearest, ties away from zero.
inline uint32_t cvt_rna_tf32(uint32_t bits) {
  const float x = uint_as_float(bits);
  if (x - x != 0.0f) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// PTX ISA, "Matrix fragments for mma.m16n8k8", tf32: a0..a3 are rows (g, g+8, g, g+8), columns t (+4 for
// a2, a3); b0, b1 are rows t (+4), column g. The 13 low bits of operands are ignored.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Args {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } args{d, a, {b0, b1}};
  emulation::check_converged("mma tf32");
  emulation::in_warp<Args>("mma tf32", args, [](Args* const* lanes) {
    const auto cut = [](uint32_t bits) {
      return static_cast<double>(uint_as_float(bits & 0xffffe000u));
    };
    double x[16][8], y[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 4; ++e) x[g + e % 2 * 8][t + e / 2 * 4] = cut(lanes[lane]->a[e]);
      for (int e = 0; e < 2; ++e) y[t + e * 4][g] = cut(lanes[lane]->b[e]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        double sum = lanes[lane]->d[e];
        for (int k = 0; k < 8; ++k) sum += x[lane / 4 + e / 2 * 8][k] * y[k][lane % 4 * 2 + e % 2];
        lanes[lane]->d[e] = static_cast<float>(sum);
      }
  });
}

inline void cp_async_zfill(void* shared, const void* global, bool inside) {
  auto run = [=] {
    if (inside)
      std::memcpy(shared, global, 16);
    else
      std::memset(shared, 0, 16);
  };
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0)
    emulation::fail("cp.async: the destination is not aligned to 16 bytes");
  if (inside && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    emulation::fail("cp.async: the source is not aligned to 16 bytes");
  if (emulation::shared_offset(shared) + 16 > emulation::shared_bytes())
    emulation::fail("cp.async: the destination ends beyond shared memory");
  emulation::CopyQueue& mine = emulation::pending_copies();
  if (emulation::draw(2) == 0)
    run();
  else
    mine.waiting.push_back({run, mine.group});
}
inline void cp_async_commit_group() { ++emulation::pending_copies().group; }
template <int kPending>
void cp_async_wait_group() {
  emulation::CopyQueue& mine = emulation::pending_copies();
  const int pending = kPending + (emulation::omitted("cp_async_wait_group") ? 1 : 0);
  auto at = mine.waiting.begin();
  for (; at != mine.waiting.end() && at->group < mine.group - pending; ++at) at->run();
  mine.waiting.erase(mine.waiting.begin(), at);
}

} // namespace offtower::cuda
