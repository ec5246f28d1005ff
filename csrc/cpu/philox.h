// Philox-4x32-10, a counter-based random number generator (Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3"). Four words of 32 bits follow from a counter and a key alone, so no
// result depends on the order in which they are drawn.
#pragma once

#include <cstdint>

namespace offtower::cpu {
namespace {

struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  uint32_t* const c = counter.word;
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t c0 = static_cast<uint32_t>(second >> 32) ^ c[1] ^ low_key;
    const uint32_t c2 = static_cast<uint32_t>(first >> 32) ^ c[3] ^ high_key;
    c[1] = static_cast<uint32_t>(second);
    c[3] = static_cast<uint32_t>(first);
    c[0] = c0;
    c[2] = c2;
    low_key += 0x9E3779B9;
    high_key += 0xBB67AE85;
  }
  return counter;
}

// The two uniform numbers in [0, 1) of a draw, 53 bits each.
struct UniformPair {
  double first, second;
};

inline UniformPair uniform_pair(uint64_t seed, int64_t stream, int64_t draw, uint32_t purpose) {
  const uint64_t row = static_cast<uint64_t>(stream);
  const PhiloxWords x = philox({{static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                                 static_cast<uint32_t>(draw), purpose}},
                               seed);
  const auto unit = [](uint32_t low, uint32_t high) {
    return static_cast<double>((static_cast<uint64_t>(high) << 32 | low) >> 11) * 0x1p-53;
  };
  return {unit(x.word[0], x.word[1]), unit(x.word[2], x.word[3])};
}

} // namespace
} // namespace offtower::cpu
