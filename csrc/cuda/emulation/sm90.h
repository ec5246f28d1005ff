// The operations of ../ptx/tma.h and wgmma.h on the emulated block. CopyQueue and wgmmas complete at once or
// later, by the seed: a copy at the latest when all threads wait, a wgmma when its warpgroup waits for it.
#pragma once

#include "sm80.h"

namespace offtower::cuda {

struct TensorMap {
  const void* data = nullptr;
  int64_t rows = 0;
  int width = 0, box_rows = 0;
};

namespace emulation {
// An mbarrier, in its eight bytes.
struct Mbarrier {
  uint8_t phase, expected, pending, magic;
  int32_t bytes; // of pending transactions
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is a 64-bit word");

inline void complete_phase(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.expected;
  progress();
}
inline Mbarrier& barrier_at(uint64_t* at) {
  auto& b = *reinterpret_cast<Mbarrier*>(at);
  if (b.magic != 0x5a) fail("an mbarrier that was not initialized");
  return b;
}
// Destination of a TMA or bulk copy.
inline void check_copy(const void* shared, uint32_t unit, std::size_t bytes) {
  if (!barrier_init_fenced()) fail("a bulk copy signals an mbarrier before fence_barrier_init");
  const uint32_t at = shared_offset(shared);
  if (at % unit != 0)
    fail("a bulk copy's destination is not aligned to " + std::to_string(unit) + " bytes");
  if (at + bytes > shared_bytes()) fail("a bulk copy ends beyond shared memory");
}
} // namespace emulation

inline int canonical_warp_idx_sync() { return thread_idx() / 32; }
inline void mbarrier_init(uint64_t* at, int arrivals) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0 || arrivals < 1 || arrivals > 255)
    emulation::fail("an mbarrier is not aligned to 8 bytes, or its arrival count is out of range");
  emulation::barrier_init_fenced() = false;
  *reinterpret_cast<emulation::Mbarrier*>(at) = {0, static_cast<uint8_t>(arrivals),
                                                 static_cast<uint8_t>(arrivals), 0x5a, 0};
}
inline void fence_barrier_init() {
  if (!emulation::omitted("fence_barrier_init")) emulation::barrier_init_fenced() = true;
}
inline void mbarrier_arrive(uint64_t* at) {
  emulation::Mbarrier& b = emulation::barrier_at(at);
  if (b.pending == 0) emulation::fail("more arrivals than an mbarrier expects");
  --b.pending;
  emulation::complete_phase(b);
}
inline void mbarrier_arrive_expect_tx(uint64_t* at, int bytes) {
  emulation::Mbarrier& b = emulation::barrier_at(at);
  b.bytes += emulation::omitted("expect_tx") ? bytes / 2 : bytes;
  if (b.bytes >= 1 << 20) emulation::fail("an mbarrier's transaction count reaches 2^20 bytes");
  mbarrier_arrive(at);
}
inline void mbarrier_wait(uint64_t* at, int parity) {
  // The producer is in warps 0 to 3 and waits for empty stages.
  if (emulation::omitted(thread_idx() < 128 ? "wait_empty" : "wait_full")) return;
  while (emulation::barrier_at(at).phase == parity) emulation::yield("an mbarrier");
}

inline void tma_load(void* shared, const TensorMap* map, int column, int row, uint64_t* at) {
  const TensorMap m = *map;
  emulation::check_copy(shared, 1024, static_cast<std::size_t>(m.box_rows) * 128);
  emulation::defer([=] {
    for (int r = 0; r < m.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + int64_t{r} < m.rows && column + c < m.width;
        const uint16_t value =
            inside ? static_cast<const uint16_t*>(m.data)[(row + int64_t{r}) * m.width + column + c]
                   : 0;
        // The 128-byte swizzle: chunk c / 8 of row r is stored at chunk (c / 8) ^ (r % 8).
        const int chunk = (c / 8) ^ (emulation::omitted("swizzle") ? 0 : r % 8);
        char* to = static_cast<char*>(shared) + r * 128 + chunk * 16 + c % 8 * 2;
        std::memcpy(to, &value, 2);
      }
    emulation::record_async_write(shared, static_cast<std::size_t>(m.box_rows) * 128);
    auto& b = *reinterpret_cast<emulation::Mbarrier*>(at);
    b.bytes -= m.box_rows * 128;
    emulation::complete_phase(b);
  });
}
inline void bulk_copy_g2s(void* shared, const void* global, int bytes, uint64_t* at) {
  emulation::check_copy(shared, 16, static_cast<std::size_t>(bytes));
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    emulation::fail("a bulk copy's source or size is not a multiple of 16 bytes");
  emulation::defer([=] {
    std::memcpy(shared, global, static_cast<std::size_t>(bytes));
    auto& b = *reinterpret_cast<emulation::Mbarrier*>(at);
    b.bytes -= bytes;
    emulation::complete_phase(b);
  });
}

namespace emulation {
struct Wgmma {
  float* d;
  const uint32_t* a_registers; // or null: A in shared memory
  uint64_t a, b;
  bool add;
  int columns;
};

// PTX ISA, "Matrix Descriptor Format": bits 0-13 address, 16-29 leading_bytes and 32-45 stride_bytes byte offset, each
// in units of 16 bytes, 49-51 base offset, 62-63 swizzle mode; the others are 0.
inline void check_descriptor(uint64_t d) {
  constexpr uint64_t kUnused = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;
  if (d >> 62 != 1) fail("a wgmma descriptor without the 128-byte swizzle");
  if ((d & kUnused) != 0 || (d >> 49 & 7) != 0)
    fail("a wgmma descriptor with a base offset or reserved bits set");
  if ((d & 0x38) != 0) fail("a wgmma descriptor that starts inside a swizzle atom");
}

// The element at a byte offset from a descriptor's address: the swizzle XORs address bits 7-9 into bits 4-6.
inline float element_at(uint64_t d, uint32_t offset) {
  uint32_t address = static_cast<uint32_t>(d & 0x3fff) * 16 + offset;
  address ^= (address >> 7 & 7) << 4;
  uint16_t value;
  std::memcpy(&value, read_async_written(address, 2), 2);
  return uint_as_float(static_cast<uint32_t>(value) << 16);
}
inline uint32_t leading_bytes(uint64_t d) { return static_cast<uint32_t>(d >> 16 & 0x3fff) * 16; }
inline uint32_t stride_bytes(uint64_t d) { return static_cast<uint32_t>(d >> 32 & 0x3fff) * 16; }

inline void multiply(const std::vector<Wgmma>& p) { // of the 128 threads of a warpgroup
  const int columns = p[0].columns;
  if (p[0].a_registers == nullptr) check_descriptor(p[0].a);
  check_descriptor(p[0].b);
  static thread_local float x[64][16], y[16][128];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) {
      if (p[0].a_registers == nullptr) {
        x[i][k] = element_at(
            p[0].a, static_cast<uint32_t>(i / 8) * stride_bytes(p[0].a) + i % 8 * 128 + k * 2);
      } else {
        const int g = i % 8, high = i / 8 % 2, t = k % 8 / 2;
        const uint32_t pair = p[i / 16 * 32 + g * 4 + t].a_registers[high + k / 8 * 2];
        x[i][k] = half_of(pair, k % 2);
      }
    }
    for (int j = 0; j < columns; ++j)
      y[k][j] =
          p[0].a_registers == nullptr
              ? element_at(p[0].b, static_cast<uint32_t>(j / 8) * stride_bytes(p[0].b) +
                                       j % 8 * 128 + k * 2)
              : element_at(p[0].b,
                           static_cast<uint32_t>(j / 64) * leading_bytes(p[0].b) + j % 64 * 2 +
                               static_cast<uint32_t>(k / 8) * stride_bytes(p[0].b) + k % 8 * 128);
  }
  for (int thread = 0; thread < 128; ++thread)
    for (int n = 0; n < columns / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8,
                  column = n * 8 + thread % 4 * 2 + e % 2;
        float& d = p[static_cast<std::size_t>(thread)].d[n * 4 + e];
        double sum = p[0].add ? d : 0.0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[row][k]) * y[k][column];
        d = static_cast<float>(sum);
      }
}

inline void issue_wgmma(Wgmma mine) {
  check_converged("wgmma");
  collective("wgmma", thread_idx() / 128 * 128, 128, &mine, [](void* const* all, int members) {
    std::vector<Wgmma> threads;
    for (int i = 0; i < members; ++i) {
      threads.push_back(*static_cast<Wgmma*>(all[i]));
      if (threads[0].a != threads.back().a || threads[0].b != threads.back().b)
        return fail("wgmma: the descriptors of a warpgroup's threads differ");
    }
    WgmmaQueue& queue = wgmma_queue();
    if (!queue.fenced) fail("wgmma without wgmma.fence after its registers were accessed");
    queue.waiting.push_back([threads] { multiply(threads); });
    if (draw(2) == 0) queue.run(queue.waiting.size());
  });
}
} // namespace emulation

template <int kMmaN>
void wgmma_ss_zero(float (&d)[kMmaN][4], uint64_t a, uint64_t b) {
  emulation::issue_wgmma({&d[0][0], nullptr, a, b, false, kMmaN * 8});
}
template <int kMmaN>
void wgmma_ss(float (&d)[kMmaN][4], uint64_t a, uint64_t b) {
  emulation::issue_wgmma({&d[0][0], nullptr, a, b, true, kMmaN * 8});
}
template <int kMmaN>
void wgmma_rs(float (&d)[kMmaN][4], const uint32_t (&a)[4], uint64_t b) {
  emulation::issue_wgmma({&d[0][0], a, 0, b, true, kMmaN * 8});
}
namespace emulation {
inline void in_warpgroup(const char* what, Combine combine) {
  if (omitted(what)) return;
  check_converged(what);
  collective(what, thread_idx() / 128 * 128, 128, nullptr, combine);
}
} // namespace emulation
inline void warpgroup_arrive() {
  emulation::in_warpgroup("warpgroup_arrive",
                          [](void* const*, int) { emulation::wgmma_queue().fenced = true; });
}
inline void warpgroup_commit_batch() {
  emulation::in_warpgroup("warpgroup_commit_batch", [](void* const*, int) {
    emulation::WgmmaQueue& queue = emulation::wgmma_queue();
    queue.committed = queue.waiting.size();
  });
}
template <int kPending>
void warpgroup_wait() {
  static_assert(kPending == 0, "the emulation completes all committed wgmmas");
  emulation::in_warpgroup("warpgroup_wait", [](void* const*, int) {
    emulation::WgmmaQueue& queue = emulation::wgmma_queue();
    queue.run(queue.committed);
    queue.fenced = false;
  });
}
template <class T, int kCount>
void warpgroup_fence_operand(T (&)[kCount][4]) {}
template <int>
void warpgroup_reg_dealloc() {}
template <int>
void warpgroup_reg_alloc() {}
// As of rank 1 in a cluster, whose shared addresses have bit 24 set: descriptors must not include it.
inline uint32_t cast_smem_ptr_to_uint(const void* p) {
  return emulation::shared_offset(p) | 1u << 24;
}

} // namespace offtower::cuda
