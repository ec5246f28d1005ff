// Hopper's operations on the emulated block. Copies and products happen at once or later, by the seed:
// a copy at the latest when everybody waits, a product when its warpgroup waits for it.
#pragma once

#include "device.h"

namespace offtower::cuda {

struct TensorMap {
  const void* data = nullptr;
  int64_t rows = 0;
  int width = 0, box_rows = 0;
};

namespace emulation {
// As it lies in the eight bytes of a barrier.
struct Barrier {
  uint8_t phase, expected, pending, ready;
  int32_t bytes; // still to come
};
static_assert(sizeof(Barrier) == 8, "a barrier has eight bytes");

inline void settle(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.expected;
  progress();
}
inline Barrier& barrier_at(uint64_t* at) {
  auto& b = *reinterpret_cast<Barrier*>(at);
  if (b.ready != 0x5a) fail("a barrier that was not initialised");
  return b;
}
// Where a copy of the engine lands.
inline void check_copy(const void* shared, uint32_t unit, std::size_t bytes) {
  if (!barriers_published()) fail("the copy engine is given a barrier that was not published");
  const uint32_t at = address_in_shared(shared);
  if (at % unit != 0) fail("a copy's target is not on " + std::to_string(unit) + " bytes");
  if (at + bytes > shared_bytes()) fail("a copy ends beyond shared memory");
}
} // namespace emulation

inline int same_in_warp(int x) { return x; }
inline void init_barrier(uint64_t* at, int arrivals) {
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0 || arrivals < 1 || arrivals > 255)
    emulation::fail("a barrier is not on 8 bytes, or expects too many");
  emulation::barriers_published() = false;
  *reinterpret_cast<emulation::Barrier*>(at) = {0, static_cast<uint8_t>(arrivals),
                                                static_cast<uint8_t>(arrivals), 0x5a, 0};
}
inline void publish_barriers() {
  if (!emulation::forgotten("publish_barriers")) emulation::barriers_published() = true;
}
inline void arrive(uint64_t* at) {
  emulation::Barrier& b = emulation::barrier_at(at);
  if (b.pending == 0) emulation::fail("more arrivals than a barrier expects");
  --b.pending;
  emulation::settle(b);
}
inline void arrive_expecting(uint64_t* at, int bytes) {
  emulation::Barrier& b = emulation::barrier_at(at);
  b.bytes += emulation::forgotten("expect") ? bytes / 2 : bytes;
  if (b.bytes >= 1 << 20) emulation::fail("a barrier counts less than 2^20 bytes");
  arrive(at);
}
inline void wait_barrier(uint64_t* at, int parity) {
  // By warps 0 to 3: of the producer, for a free stage.
  if (emulation::forgotten(thread_index() < 128 ? "wait_free" : "wait_full")) return;
  while (emulation::barrier_at(at).phase == parity) emulation::wait_a_while("a barrier in shared memory");
}

inline void copy_box(void* shared, const TensorMap* map, int column, int row, uint64_t* at) {
  const TensorMap m = *map;
  emulation::check_copy(shared, 1024, static_cast<std::size_t>(m.box_rows) * 128);
  emulation::later([=] {
    for (int r = 0; r < m.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + int64_t{r} < m.rows && column + c < m.width;
        const uint16_t value =
            inside ? static_cast<const uint16_t*>(m.data)[(row + int64_t{r}) * m.width + column + c] : 0;
        // Piece c / 8 of row r lies at piece (c / 8) ^ (r % 8).
        const int piece = (c / 8) ^ (emulation::forgotten("swizzle") ? 0 : r % 8);
        char* to = static_cast<char*>(shared) + r * 128 + piece * 16 + c % 8 * 2;
        std::memcpy(to, &value, 2);
      }
    emulation::written_by_engine(shared, static_cast<std::size_t>(m.box_rows) * 128);
    auto& b = *reinterpret_cast<emulation::Barrier*>(at);
    b.bytes -= m.box_rows * 128;
    emulation::settle(b);
  });
}
inline void copy_bytes(void* shared, const void* global, int bytes, uint64_t* at) {
  emulation::check_copy(shared, 16, static_cast<std::size_t>(bytes));
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    emulation::fail("a bulk copy is not on 16 bytes");
  emulation::later([=] {
    std::memcpy(shared, global, static_cast<std::size_t>(bytes));
    auto& b = *reinterpret_cast<emulation::Barrier*>(at);
    b.bytes -= bytes;
    emulation::settle(b);
  });
}

namespace emulation {
struct Product {
  float* d;
  const uint32_t* a_registers; // or null
  uint64_t a, b;
  bool add;
  int columns;
};

// PTX ISA, "Matrix descriptor": bits 0-13 address, 16-29 leading and 32-45 stride offset, each in 16
// bytes, 49-51 where in its pattern of 1,024 bytes the matrix starts, 62-63 the swizzle; others are 0.
inline void check_descriptor(uint64_t d) {
  constexpr uint64_t kUnused = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;
  if (d >> 62 != 1) fail("a descriptor without the 128-byte swizzle");
  if ((d & kUnused) != 0 || (d >> 49 & 7) != 0) fail("a descriptor with bits that must be 0");
  if ((d & 0x38) != 0) fail("a descriptor of a matrix that starts inside its pattern");
}

// The number at a byte offset from a descriptor's address, through the swizzle: address bits 7-9 are
// added to bits 4-6 without carry.
inline float number_at(uint64_t d, uint32_t offset) {
  uint32_t address = static_cast<uint32_t>(d & 0x3fff) * 16 + offset;
  address ^= (address >> 7 & 7) << 4;
  uint16_t value;
  std::memcpy(&value, read_by_cores(address, 2), 2);
  return float_of_bits(static_cast<uint32_t>(value) << 16);
}
inline uint32_t leading(uint64_t d) { return static_cast<uint32_t>(d >> 16 & 0x3fff) * 16; }
inline uint32_t stride(uint64_t d) { return static_cast<uint32_t>(d >> 32 & 0x3fff) * 16; }

inline void multiply(const std::vector<Product>& p) { // of the 128 threads of a warpgroup
  const int columns = p[0].columns;
  if (p[0].a_registers == nullptr) check_descriptor(p[0].a);
  check_descriptor(p[0].b);
  static thread_local float x[64][16], y[16][128];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) {
      if (p[0].a_registers == nullptr) {
        x[i][k] = number_at(p[0].a, static_cast<uint32_t>(i / 8) * stride(p[0].a) + i % 8 * 128 + k * 2);
      } else {
        const int g = i % 8, high = i / 8 % 2, t = k % 8 / 2;
        const uint32_t pair = p[i / 16 * 32 + g * 4 + t].a_registers[high + k / 8 * 2];
        x[i][k] = half_of(pair, k % 2);
      }
    }
    for (int j = 0; j < columns; ++j)
      y[k][j] = p[0].a_registers == nullptr
                    ? number_at(p[0].b, static_cast<uint32_t>(j / 8) * stride(p[0].b) + j % 8 * 128 + k * 2)
                    : number_at(p[0].b, static_cast<uint32_t>(j / 64) * leading(p[0].b) + j % 64 * 2 +
                                            static_cast<uint32_t>(k / 8) * stride(p[0].b) + k % 8 * 128);
  }
  for (int thread = 0; thread < 128; ++thread)
    for (int n = 0; n < columns / 8; ++n)
      for (int e = 0; e < 4; ++e) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8, column = n * 8 + thread % 4 * 2 + e % 2;
        float& d = p[static_cast<std::size_t>(thread)].d[n * 4 + e];
        double sum = p[0].add ? d : 0.0;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[row][k]) * y[k][column];
        d = static_cast<float>(sum);
      }
}

inline void product_of_group(Product mine) {
  collective("wgmma", thread_index() / 128 * 128, 128, &mine, [](void* const* all, int members) {
    std::vector<Product> products;
    for (int i = 0; i < members; ++i) {
      products.push_back(*static_cast<Product*>(all[i]));
      if (products[0].a != products.back().a || products[0].b != products.back().b)
        return fail("a warpgroup disagrees about a descriptor");
    }
    Products& ours = products_of_this_group();
    if (!ours.fenced) fail("a product after its registers were touched, without wgmma.fence");
    ours.waiting.push_back([products] { multiply(products); });
    if (draw(2) == 0) ours.run(ours.waiting.size());
  });
}
} // namespace emulation

template <int kTiles>
void start_group_scores(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  emulation::product_of_group({&d[0][0], nullptr, a, b, false, kTiles * 8});
}
template <int kTiles>
void add_group_scores(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  emulation::product_of_group({&d[0][0], nullptr, a, b, true, kTiles * 8});
}
template <int kTiles>
void group_weigh(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  emulation::product_of_group({&d[0][0], a, 0, b, true, kTiles * 8});
}
namespace emulation {
inline void in_group(const char* what, Together together) {
  if (forgotten(what)) return;
  collective(what, thread_index() / 128 * 128, 128, nullptr, together);
}
} // namespace emulation
inline void before_products() {
  emulation::in_group("wgmma fence", [](void* const*, int) { emulation::products_of_this_group().fenced = true; });
}
inline void commit_products() {
  emulation::in_group("wgmma commit", [](void* const*, int) {
    emulation::Products& p = emulation::products_of_this_group();
    p.committed = p.waiting.size();
  });
}
inline void wait_products() {
  emulation::in_group("wgmma wait", [](void* const*, int) {
    emulation::Products& p = emulation::products_of_this_group();
    p.run(p.committed);
    p.fenced = false;
  });
}
template <class T, int kCount>
void pin(T (&)[kCount][4]) {}
template <int>
void give_registers() {}
template <int>
void take_registers() {}
inline uint32_t shared_address(const void* p) { return emulation::address_in_shared(p); }

} // namespace offtower::cuda
