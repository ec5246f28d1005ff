// Streaming log-sum-exp of a softmax policy's logits over all items, without a (rows, items) array.
//
// Torch-free: plain pointers and sizes. One translation unit per instruction set implements
// `log_normalizer_block`; `dispatch.cpp` picks one at run time.
#pragma once

#include <cstdint>

namespace offtower::cpu {

// Operands of the forward pass, row-major and contiguous.
struct LogNormalizerArgs {
  const float* context;   // (rows, dim), already divided by the temperature
  const float* item;      // (items, dim)
  const float* item_bias; // (items,) or null
  float* out;             // (rows,)
  int64_t rows;
  int64_t items;
  int64_t dim;
};

// Computes rows [begin, end); `begin` is a multiple of the kernel's lane count, so that a row's
// neighbours in the vector registers, and with them its bits, do not depend on the threads.
using BlockKernel = void (*)(const LogNormalizerArgs& args, int64_t begin, int64_t end);

struct Kernel {
  const char* isa;
  int64_t lanes; // contexts computed together
  BlockKernel run;
};

const Kernel& portable_kernel();
#if defined(__x86_64__)
const Kernel& avx2_kernel();
const Kernel& avx512_kernel();
#endif

// The widest kernel that this machine runs, or the one called `isa` ("" for none in particular).
// Throws std::invalid_argument for an unknown one or one that this machine lacks.
const Kernel& choose_kernel(const char* isa);

// All rows, by up to `threads` threads. The result does not depend on their number.
// `interrupted` is asked between blocks, by the calling thread alone; true stops early.
// Returns false if it was stopped.
bool log_normalizer(const LogNormalizerArgs& args, const Kernel& kernel, int threads,
                    bool (*interrupted)());

} // namespace offtower::cpu
