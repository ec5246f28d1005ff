// The operators on a CUDA device, as launchers that take plain pointers, sizes and a stream.
//
// Each is called twice: without a workspace it launches nothing and returns the bytes that the workspace
// must have; with one it launches its kernels on the stream and returns. Neither call allocates memory or
// waits for the device, so both can be captured into a CUDA graph. Arrays are on the device, contiguous and
// aligned to 16 bytes; rows of matrices are multiples of 16 bytes. Failures throw std::runtime_error with
// CUDA's message.
#pragma once

#include <string>
#include <vector>

#include "../operands.h"

namespace offtower::cuda {

struct Device {
  int number, major, minor;
  int multiprocessors;
  int block_shared, total_shared; // bytes of shared memory, for a block and of a multiprocessor
  bool hopper_kernels;            // else the portable ones alone
};

struct Call {
  Device device;
  void* stream;
  void* workspace; // null: only return its size
};

constexpr int64_t kMaxK = 1024; // of top_k

Device device_properties(int number);

// Why the kernels do not accept these operands on the device, or "".
std::string refusal(const PolicyOperands& o, const Device& device);

// How each pass over such operands is divided into blocks.
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
