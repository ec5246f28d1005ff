// The threads of one call, and its interruption.
//
// They are torch's OpenMP threads where its runtime is found: those spin for milliseconds after each
// torch operator, and other threads would compete with them for the cores (a third of the time of a
// 10 ms call). Elsewhere, and in forked children, where the parent's pool does not exist, they are
// plain threads that end with the call. Results do not depend on the choice.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace offtower::cpu {

// Time of a steady clock.
double seconds();

// Whether calls of this process run on torch's OpenMP threads.
bool uses_torch_threads();

class Workers {
public:
  // `interrupted` is called by the calling thread only, at most every 20 ms; true ends the call.
  Workers(int threads, bool (*interrupted)());

  int threads() const { return threads_; }

  // Calls task(context, index, worker) for every index below `count`, started in order; worker 0 is
  // the calling thread. Returns false if it was interrupted; rethrows the first exception of a task.
  using Task = void (*)(void* context, int64_t index, int worker);
  bool run(int64_t count, Task task, void* context);

  // Tasks call this every few milliseconds of work and return at once if it is true.
  bool stopped(int worker);

private:
  const int threads_;
  bool (*const interrupted_)();
  std::atomic<bool> stop_{false};
  std::chrono::steady_clock::time_point last_poll_;
};

} // namespace offtower::cpu
