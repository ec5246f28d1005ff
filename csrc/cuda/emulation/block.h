// A thread block on the host: each thread is a fiber, with warps and barriers as on the device.
//
// Fibers run in a random order drawn from a seed, and an asynchronous copy completes at once or as late as
// its wait allows, so that a missing barrier, a missing wait or a buffer that is reused too early gives
// wrong results here too. Shared memory starts as NaNs. A collective operation that some thread never
// reaches is reported by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace offtower::cuda::emulation {

int thread_idx();
int block_dim();
int64_t block_idx();
int64_t grid_dim();

// Waits for `members` threads from `first` on, which must all pass the same `what`; the last one runs
// `combine` on what each of them passes.
using Combine = void (*)(void* const* args, int members);
void collective(const char* what, int first, int members, void* args, Combine combine);
// Lets other threads run; `what` is reported if none can ever go on.
void yield(const char* what);
// Reports a change that a yielding thread may be waiting for.
void progress();
// Uniform over 0 to bound - 1, from the seed.
uint32_t draw(uint32_t bound);
// Ends the block with an error.
[[noreturn]] void fail(const std::string& what);

// Pending copies of this thread, oldest first, with the numbers of their groups.
struct Copy {
  std::function<void()> run;
  int group;
};
struct CopyQueue {
  std::vector<Copy> waiting;
  int group = 0;
};
CopyQueue& pending_copies();

// Runs `what` at once or after a random delay.
void defer(std::function<void()> what);

// wgmmas that this thread's warpgroup has issued and not waited for, in order. A wait completes committed
// ones alone, and the first wgmma after it needs a fence, since threads may have accessed its registers.
struct WgmmaQueue {
  std::vector<std::function<void()>> waiting;
  std::size_t committed = 0;
  bool fenced = false;

  void run(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) waiting[i]();
    waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(count));
    committed -= committed < count ? committed : count;
  }
};
WgmmaQueue& wgmma_queue();

// Whether this thread took a branch that others of its warp may not have taken, since the warp last
// synchronized.
void set_diverged(bool diverged);
bool diverged();

uint32_t shared_offset(const void* p);
std::size_t shared_bytes();
// TMA and wgmma access shared memory through the async proxy. Operands of wgmma must be what TMA wrote:
// threads' own writes would need a proxy fence, which no kernel has.
void record_async_write(const void* at, std::size_t bytes);
const char* read_async_written(uint32_t address, int bytes);
// TMA sees mbarriers after fence_barrier_init alone.
bool& barrier_init_fenced();
// Whether OFFTOWER_EMULATION_WITHOUT names this operation, which then does nothing: a fault to detect.
bool omitted(const char* operation);

// Runs `body(shared)` in `threads` fibers for each of `blocks` blocks. Throws std::runtime_error.
void run(int64_t blocks, int threads, std::size_t shared_bytes,
         const std::function<void(char* shared)>& body);

} // namespace offtower::cuda::emulation
