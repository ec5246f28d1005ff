// One thread block on the host: each thread a fiber, warps and barriers as on the device.
//
// Fibers run in an order drawn from a seed, and an asynchronous copy lands at once or as late as its
// wait allows, so that a missing barrier, a missing wait or a buffer reused too early gives wrong
// numbers here too. Shared memory starts as NaNs. A collective operation that not all lanes of a
// warp reach, or a barrier that some thread never reaches, is reported with its name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace offtower::cuda::emulation {

// What the block's fibers see of themselves.
int thread_index();
int thread_count();
int64_t block_index();
int64_t block_count();

// Waits for `members` threads from `first` on, all of which pass the same `what` and `args`-array;
// the last to come runs `together` on what each of them brought.
using Together = void (*)(void* const* brought, int members);
void collective(const char* what, int first, int members, void* brought, Together together);
// Named barriers: `members` threads in all, in any order.
void barrier(int name, int members);
// Lets others run; `what` says what is waited for, should nothing ever change.
void wait_a_while(const char* what);
// Something changed that a waiting fiber may look for.
void progress();
// 0 to bound - 1, from the seed.
uint32_t draw(uint32_t bound);
// Ends the block with an error.
[[noreturn]] void fail(const std::string& what);
// Per thread: copies under way, oldest first; groups are numbered.
struct Copy {
  std::function<void()> run;
  int group;
};
struct Copies {
  std::vector<Copy> waiting;
  int group = 0;
};
Copies& copies_of_this_thread();

// Something asynchronous: at once, or at some later time.
void later(std::function<void()> what);
// What this thread's warpgroup has started and not waited for, in order. A wait is for the committed
// ones; the first after a wait needs a fence, since threads may have touched its registers.
struct Products {
  std::vector<std::function<void()>> waiting;
  std::size_t committed = 0;
  bool fenced = false;

  void run(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) waiting[i]();
    waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(count));
    committed -= committed < count ? committed : count;
  }
};
Products& products_of_this_group();
// Addresses within the block's shared memory, and its size.
uint32_t address_in_shared(const void* p);
std::size_t shared_bytes();
// The copy engine and the tensor cores see shared memory through a proxy of their own: what the engine
// has written, from `at` on, and what the cores read there, which must still be just that.
void written_by_engine(const void* at, std::size_t bytes);
const char* read_by_cores(uint32_t address, int bytes);
// Barriers are unknown to the copy engine until they are published.
bool& barriers_published();
// Whether OFFTOWER_EMULATION_WITHOUT names this operation: then it does nothing, as if a kernel had
// forgotten it. The tests see to it that each such fault shows.
bool forgotten(const char* operation);

// Runs `body(shared)` in `threads` fibers for each of `blocks` blocks. Throws std::runtime_error.
void run(int64_t blocks, int threads, std::size_t shared_bytes,
         const std::function<void(char* shared)>& body);

} // namespace offtower::cuda::emulation
