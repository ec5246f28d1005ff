#include "workers.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "torch_threads.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace offtower::cpu {
namespace {

// One run, shared by its threads.
struct Job {
  Workers* workers;
  Workers::Task task;
  void* context;
  int64_t count;
  std::thread::id caller;
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};
  std::atomic<bool> failed{false};
  std::mutex guard;
  std::exception_ptr failure;
};

// Results that would be subnormal are zero while it lives: vscalefps and multiplications take some
// 200 cycles for each otherwise, and logits 90 below the largest have such exponentials.
class FlushSubnormals {
public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

private:
  const unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

void work(void* shared) {
  Job& job = *static_cast<Job*>(shared);
  const int worker = std::this_thread::get_id() == job.caller ? 0 : 1 + job.helpers.fetch_add(1);
  if (worker >= job.workers->threads()) return; // more than requested
  try {
    const FlushSubnormals flush;
    for (int64_t index; !job.failed && !job.workers->stopped(worker) &&
                        (index = job.next.fetch_add(1)) < job.count;)
      job.task(job.context, index, worker);
  } catch (...) {
    const std::lock_guard<std::mutex> held(job.guard);
    if (!job.failure) job.failure = std::current_exception();
    job.failed = true;
  }
}

void run_on_own_threads(Job& job, int64_t wanted) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(wanted));
  try {
    for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work, &job);
  } catch (const std::system_error&) {
    // No more threads can be created: those that started do the work, with the same result.
  }
  work(&job);
  for (std::thread& helper : helpers) helper.join();
}

} // namespace

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool uses_torch_threads() { return torch_parallel() != nullptr; }

Workers::Workers(int threads, bool (*interrupted)())
    : threads_(std::max(threads, 1)), interrupted_(interrupted),
      last_poll_(std::chrono::steady_clock::now()) {}

bool Workers::run(int64_t count, Task task, void* context) {
  Job job{this, task, context, count, std::this_thread::get_id(), {}, {}, {}, {}, {}};
  const int64_t wanted = std::min<int64_t>(threads_, count);
  const ParallelCall parallel = torch_parallel();
  if (wanted <= 1)
    work(&job);
  else if (parallel != nullptr)
    parallel(work, &job, static_cast<unsigned>(wanted), 0);
  else
    run_on_own_threads(job, wanted);
  if (job.failure) std::rethrow_exception(job.failure);
  return !stop_;
}

bool Workers::stopped(int worker) {
  if (stop_) return true;
  if (worker != 0) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_poll_ < std::chrono::milliseconds(20)) return false;
  last_poll_ = now;
  if (interrupted_()) stop_ = true;
  return stop_;
}

} // namespace offtower::cpu
