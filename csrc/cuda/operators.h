// The operators on a CUDA device: launchers that take plain pointers, sizes and a stream.
//
// Each call is made twice: without a workspace it launches nothing and returns how many bytes the
// workspace must have; with one it launches its kernels on the stream and returns at once. Nothing
// waits for the device and nothing is allocated, so a call can be captured into a graph. Operands are on
// the device, contiguous, on 16 bytes, and their rows are multiples of 16 bytes. Throws
// std::runtime_error with CUDA's message.
#pragma once

#include <string>
#include <vector>

#include "../operands.h"

namespace offtower::cuda {

struct Device {
  int number, major, minor;
  int multiprocessors;
  int block_shared, total_shared; // bytes of shared memory: a block may have, a multiprocessor has
};

struct Call {
  Device device;
  void* stream;
  void* workspace; // null: only count
};

constexpr int64_t kMostK = 1024; // of top_k

// Facts about a device.
Device device_facts(int number);

// Why these operands are not computed here, or "".
std::string refusal(const PolicyOperands& o, const Device& device);

// How each pass over such operands is cut into blocks: for those who want to know.
struct PassPlan {
  const char* name; // "forward", "du", "dv"
  bool fits, hopper;
  int threads, splits, stages, shared_bytes;
  int64_t blocks;
};
std::vector<PassPlan> plans(const PolicyOperands& o, const Device& device);

int64_t forward(const PolicyOperands& o, const ForwardResults& results, const Call& call);
int64_t backward(const BackwardOperands& in, const BackwardResults& results, const Call& call);
int64_t top_k(const PolicyOperands& o, const TopKResults& results, const Call& call);

} // namespace offtower::cuda
