// The threads of one call, and its interruption.
//
// They are torch's own where they can be found: its OpenMP threads spin for milliseconds after each
// of its operators, and threads of ours would fight them for the cores (a third of the time of a
// 10 ms call). Elsewhere, and in forked children, where an OpenMP pool is not to be used, they are
// plain threads that end with the call. Results do not depend on it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace offtower::cpu {

// Of a steady clock.
double seconds();

// Whether calls of this process run on torch's OpenMP threads.
bool uses_torch_threads();

class Workers {
public:
  // `interrupted` is asked by the calling thread alone, at most every 20 ms; true ends the call.
  Workers(int threads, bool (*interrupted)());

  int threads() const { return threads_; }

  // task(context, index, worker) for every index below `count`, handed out in order; worker 0 is
  // the calling thread. Returns false if it was interrupted; rethrows the first exception of a task.
  using Task = void (*)(void* context, int64_t index, int worker);
  bool run(int64_t count, Task task, void* context);

  // To be asked by a task every few milliseconds of work; when true, the task returns at once.
  bool stopped(int worker);

private:
  const int threads_;
  bool (*const interrupted_)();
  std::atomic<bool> stop_{false};
  std::chrono::steady_clock::time_point asked_;
};

} // namespace offtower::cpu
