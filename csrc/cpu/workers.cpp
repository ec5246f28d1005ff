#include "workers.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace offtower::cpu {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Workers::Workers(int threads, bool (*interrupted)())
    : threads_(std::max(threads, 1)), interrupted_(interrupted),
      asked_(std::chrono::steady_clock::now()) {}

bool Workers::run(int64_t count, Task task, void* context) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto work = [&](int worker) {
    try {
      for (int64_t index; !stopped(worker) && (index = next.fetch_add(1)) < count;)
        task(context, index, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> held(guard);
      if (!failure) failure = std::current_exception();
      stop_ = true;
    }
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(threads_, count);
  helpers.reserve(static_cast<size_t>(std::max<int64_t>(wanted - 1, 0)));
  try {
    for (int worker = 1; worker < wanted; ++worker) helpers.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do the work. The result is the same.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
  return !stop_;
}

bool Workers::stopped(int worker) {
  if (stop_) return true;
  if (worker != 0) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - asked_ < std::chrono::milliseconds(20)) return false;
  asked_ = now;
  if (interrupted_()) stop_ = true;
  return stop_;
}

} // namespace offtower::cpu
