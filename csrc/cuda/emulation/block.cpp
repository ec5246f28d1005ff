#include "block.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#if !defined(__x86_64__)
#error "the emulation switches fibers in x86-64 assembly"
#endif

extern "C" void offtower_switch_fiber(void** from, void* to);
asm(R"(
.text
.globl offtower_switch_fiber
offtower_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace offtower::cuda::emulation {
namespace {

constexpr std::size_t kStack = 256 << 10;
constexpr std::size_t kGuard = 4096; // bytes beyond shared memory that must stay unchanged
constexpr unsigned char kPoison = 0xff;

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  bool done = false, blocked = false, diverged = false;
  uint32_t asleep = 0; // scheduler passes left to skip
  const char* waits_for = "";
  CopyQueue copies;
};

struct Rendezvous {
  std::vector<void*> args;
  std::vector<int> waiting;
  const char* what = nullptr;
};

struct Deferred {
  std::function<void()> run;
  uint32_t passes; // until it runs
};

struct Block {
  std::vector<Fiber> fibers;
  std::map<std::pair<int, int>, Rendezvous> rendezvous; // by (first, members)
  int64_t index = 0, count = 0;
  int current = 0;
  uint64_t changes = 0;
  void* scheduler = nullptr;
  std::string error;
  const std::function<void(char*)>* body = nullptr;
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Deferred> deferred;
  std::map<int, WgmmaQueue> wgmmas;             // by warpgroup
  std::vector<char> async_written, async_bytes; // of shared memory: which bytes, and their values
  bool init_fenced = true;
};

Block* block = nullptr;
uint64_t random_state = 1;
std::string fault;

void to_scheduler() {
  offtower_switch_fiber(&block->fibers[block->current].stack_pointer, block->scheduler);
}

void start() {
  (*block->body)(block->shared);
  Fiber& self = block->fibers[block->current];
  self.done = true;
  ++block->changes;
  to_scheduler();
  std::abort();
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8; // six registers, the entry, alignment
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&start);
  frame[7] = nullptr;
  fiber.stack_pointer = frame;
  fiber.done = fiber.blocked = fiber.diverged = false;
  fiber.copies = CopyQueue{};
}

void block_fiber(const char* what) {
  Fiber& self = block->fibers[block->current];
  self.blocked = true;
  self.waits_for = what;
  to_scheduler();
}

void wake(const std::vector<int>& fibers) {
  for (int f : fibers) block->fibers[f].blocked = false;
  ++block->changes;
}

std::string state() {
  std::map<std::string, int> counts;
  for (const Fiber& f : block->fibers) ++counts[f.done ? "end" : f.waits_for];
  std::string text;
  for (const auto& [what, n] : counts) text += " " + std::to_string(n) + " at " + what + ";";
  return text;
}

void run_one(int64_t index) {
  block->index = index;
  for (Fiber& f : block->fibers) prepare(f);
  block->rendezvous.clear();
  block->wgmmas.clear();
  block->async_written.assign(block->shared_bytes, 0);
  block->async_bytes.assign(block->shared_bytes, 0);
  std::vector<int> ready;
  uint64_t seen = block->changes;
  int idle = 0;
  while (true) {
    ready.clear();
    bool all_done = true;
    for (int f = 0; f < static_cast<int>(block->fibers.size()); ++f) {
      all_done &= block->fibers[f].done;
      if (!block->fibers[f].done && !block->fibers[f].blocked) ready.push_back(f);
    }
    if (all_done) break;
    // Deferred operations run after their delay, at the latest when no thread can go on.
    for (Deferred& operation : std::exchange(block->deferred, {})) {
      if (operation.passes == 0 || ready.empty() || idle > 24)
        operation.run();
      else
        block->deferred.push_back({std::move(operation.run), operation.passes - 1});
    }
    if (ready.empty() && block->changes != seen) continue;
    if (ready.empty()) throw std::runtime_error("deadlock:" + state());
    // Run the ready fibers in random order.
    for (std::size_t i = ready.size(); i > 1; --i)
      std::swap(ready[i - 1], ready[draw(static_cast<uint32_t>(i))]);
    for (int f : ready) {
      Fiber& fiber = block->fibers[f];
      if (fiber.done || fiber.blocked) continue;
      // Lanes of a warp may be any distance apart: sometimes a few passes, rarely many.
      if (fiber.asleep == 0) {
        const uint32_t lot = draw(1 << 14);
        if (lot < 256) fiber.asleep = draw(6);
        if (lot == 256) fiber.asleep = draw(400);
      }
      if (fiber.asleep > 0) {
        --fiber.asleep;
        continue;
      }
      block->current = f;
      offtower_switch_fiber(&block->scheduler, fiber.stack_pointer);
      if (!block->error.empty()) throw std::runtime_error(block->error);
    }
    idle = block->changes == seen ? idle + 1 : 0;
    seen = block->changes;
    if (idle > 1000) throw std::runtime_error("livelock:" + state());
  }
  if (!block->deferred.empty()) throw std::runtime_error("a block ended with copies in flight");
  for (const auto& [group, queue] : block->wgmmas)
    if (!queue.waiting.empty()) throw std::runtime_error("a warpgroup ended with wgmmas in flight");
}

} // namespace

int thread_idx() { return block->current; }
int block_dim() { return static_cast<int>(block->fibers.size()); }
int64_t block_idx() { return block->index; }
int64_t grid_dim() { return block->count; }
void progress() { ++block->changes; }
CopyQueue& pending_copies() { return block->fibers[block->current].copies; }

uint32_t draw(uint32_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 33) % bound);
}

void fail(const std::string& what) {
  block->error = what + " (thread " + std::to_string(block->current) + " of block " +
                 std::to_string(block->index) + ")";
  to_scheduler();
  std::abort();
}

void collective(const char* what, int first, int members, void* args, Combine combine) {
  Rendezvous& point = block->rendezvous[{first, members}];
  if (point.waiting.empty()) {
    point.what = what;
    point.args.assign(static_cast<std::size_t>(members), nullptr);
  } else if (std::strcmp(point.what, what) != 0) {
    fail(std::string("lanes of one warp are at ") + point.what + " and at " + what);
  }
  const int lane = block->current - first;
  if (lane < 0 || lane >= members) fail(std::string(what) + " of a thread outside the group");
  point.args[static_cast<std::size_t>(lane)] = args;
  point.waiting.push_back(block->current);
  if (static_cast<int>(point.waiting.size()) < members) return block_fiber(what);
  if (combine != nullptr) combine(point.args.data(), members);
  const std::vector<int> all = std::exchange(point.waiting, {});
  wake(all);
}

void set_diverged(bool diverged) { block->fibers[block->current].diverged = diverged; }
bool diverged() { return block->fibers[block->current].diverged; }

void defer(std::function<void()> what) {
  if (draw(2) == 0)
    what();
  else
    block->deferred.push_back({std::move(what), draw(32)});
}

WgmmaQueue& wgmma_queue() { return block->wgmmas[block->current / 128]; }
bool& barrier_init_fenced() { return block->init_fenced; }
bool omitted(const char* operation) { return fault == operation; }

uint32_t shared_offset(const void* p) {
  const auto offset = static_cast<const char*>(p) - block->shared;
  if (offset < 0 || static_cast<std::size_t>(offset) > block->shared_bytes)
    fail("an address outside shared memory");
  return static_cast<uint32_t>(offset);
}

std::size_t shared_bytes() { return block->shared_bytes; }

void record_async_write(const void* at, std::size_t bytes) {
  const auto from = static_cast<std::size_t>(static_cast<const char*>(at) - block->shared);
  std::memcpy(block->async_bytes.data() + from, at, bytes);
  std::memset(block->async_written.data() + from, 1, bytes);
}

const char* read_async_written(uint32_t address, int bytes) {
  if (address + static_cast<std::size_t>(bytes) > block->shared_bytes)
    fail("wgmma reads beyond shared memory");
  const char* at = block->shared + address;
  for (int i = 0; i < bytes; ++i)
    if (block->async_written[address + static_cast<uint32_t>(i)] == 0 ||
        block->async_bytes[address + static_cast<uint32_t>(i)] != at[i])
      fail("wgmma reads what TMA has not written, or what a thread wrote without a proxy fence");
  return at;
}

void yield(const char* what) {
  block->fibers[block->current].waits_for = what;
  to_scheduler();
}

void run(int64_t blocks, int threads, std::size_t shared_bytes,
         const std::function<void(char* shared)>& body) {
  if (const char* seed = std::getenv("OFFTOWER_EMULATION_SEED"))
    random_state = 0x9e3779b97f4a7c15ull * (std::strtoull(seed, nullptr, 10) + 1);
  const char* without = std::getenv("OFFTOWER_EMULATION_WITHOUT");
  fault = without == nullptr ? "" : without;
  Block mine;
  mine.fibers.resize(static_cast<std::size_t>(threads));
  mine.count = blocks;
  mine.body = &body;
  std::vector<char> memory(shared_bytes + kGuard + 1024);
  const auto base = reinterpret_cast<uintptr_t>(memory.data());
  mine.shared = memory.data() + ((base + 1023) / 1024 * 1024 - base);
  mine.shared_bytes = shared_bytes;
  block = &mine;
  for (int64_t index = 0; index < blocks; ++index) {
    std::memset(mine.shared, kPoison, shared_bytes + kGuard - 1024);
    run_one(index);
    for (std::size_t i = shared_bytes; i < shared_bytes + kGuard - 1024; ++i)
      if (static_cast<unsigned char>(mine.shared[i]) != kPoison)
        throw std::runtime_error("a block wrote beyond its shared memory");
  }
  block = nullptr;
}

} // namespace offtower::cuda::emulation
