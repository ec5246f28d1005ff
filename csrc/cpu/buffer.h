// Aligned, zeroed memory. In an unnamed namespace, so that the linker cannot share code between
// translation units that are compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace offtower::cpu {
namespace {

template <class T>
class Buffer {
public:
  Buffer() = default;
  explicit Buffer(int64_t length) { resize(length); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void resize(int64_t length) {
    std::free(data_);
    data_ = nullptr;
    if (length <= 0) return;
    const size_t bytes = (static_cast<size_t>(length) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

private:
  T* data_ = nullptr;
};

// Several T, such as one per worker, constructed by the calling thread before the work starts.
template <class T>
class Objects {
public:
  Objects() = default;
  ~Objects() {
    for (int64_t i = 0; i < count_; ++i) delete made_[i];
  }
  Objects(const Objects&) = delete;
  Objects& operator=(const Objects&) = delete;

  template <class... Args>
  void fill(int64_t count, const Args&... args) {
    made_.resize(count);
    for (; count_ < count; ++count_) made_[count_] = new T(args...);
  }
  T& operator[](int64_t i) { return *made_[i]; }

private:
  int64_t count_ = 0;
  Buffer<T*> made_;
};

} // namespace
} // namespace offtower::cpu
