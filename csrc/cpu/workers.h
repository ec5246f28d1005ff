// Threads for the length of one call, and its interruption.
//
// No second pool spins beside torch's, and nothing is left behind for a forked child to inherit.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace offtower::cpu {

// Of a steady clock.
double seconds();

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
