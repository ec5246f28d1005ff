// Products over candidate lists: dots of a row with the items of its list, and weighted sums of them.
//
// The items of a list lie anywhere in memory, so rows some entries ahead are prefetched. A task is a
// range of lists; each result is computed by one task in the order of its entries.
#pragma once

#include "../../operands.h"
#include "../buffer.h"
#include "../workers.h"
#include "arithmetic.h"

namespace offtower::cpu {
namespace {

constexpr int64_t kListTasks = 512;  // at most
constexpr int64_t kListsPerTask = 4; // at least
constexpr int64_t kPrefetched = 8;   // entries ahead
constexpr int64_t kSummed = 32;      // entries of a short sum: two short sums have a smaller error

template <class A>
OFFTOWER_INLINE typename A::F load_values(const float* p) {
  return A::load(p);
}
template <class A>
OFFTOWER_INLINE typename A::F load_values(const Bfloat16* p) {
  alignas(64) float wide[A::kWidth];
  for (int lane = 0; lane < A::kWidth; ++lane) wide[lane] = to_float(p[lane]);
  return A::load(wide);
}

// Sum of the lanes, in a fixed order.
template <class A>
OFFTOWER_INLINE float sum_of(typename A::F x) {
  alignas(64) float lanes[A::kWidth];
  A::store(lanes, x);
  OFFTOWER_UNROLL
  for (int half = A::kWidth / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// `Derived` has `void list(int64_t row, Buffer<float>& scratch)`.
template <class T, class Derived>
class ListTasks {
public:
  ListTasks(const ItemLists& lists, const void* matrix, int64_t dim, Workers& workers)
      : lists_(lists), matrix_(static_cast<const T*>(matrix)), dim_(dim), workers_(workers),
        per_task_(max(kListsPerTask, ceil_div(lists.rows, kListTasks))) {}

  bool run() {
    const int64_t tasks = ceil_div(lists_.rows, per_task_);
    scratch_.fill(min(workers_.threads(), tasks), dim_);
    const auto task = [](void* self, int64_t index, int worker) {
      auto& mine = *static_cast<Derived*>(self);
      const int64_t end = min((index + 1) * mine.per_task_, mine.lists_.rows);
      for (int64_t row = index * mine.per_task_; row < end; ++row) {
        if (mine.workers_.stopped(worker)) return;
        mine.list(row, mine.scratch_[worker]);
      }
    };
    return workers_.run(tasks, task, static_cast<Derived*>(this));
  }

protected:
  const T* matrix_row(int64_t entry) const { return matrix_ + lists_.items[entry] * dim_; }
  void prefetch(int64_t entry) const {
    if (entry >= lists_.offsets[lists_.rows]) return;
    const char* p = reinterpret_cast<const char*>(matrix_row(entry));
    for (int64_t at = 0; at < dim_ * static_cast<int64_t>(sizeof(T)); at += 64)
      __builtin_prefetch(p + at, 0, 2);
  }

  const ItemLists lists_;
  const T* const matrix_;
  const int64_t dim_;
  Workers& workers_;
  const int64_t per_task_;
  Objects<Buffer<float>> scratch_; // dim_ floats a worker
};

template <class A, class T>
class Dots : public ListTasks<T, Dots<A, T>> {
public:
  Dots(const ListDots& x, Workers& workers)
      : ListTasks<T, Dots>(x.lists, x.matrix, x.dim, workers), x_(x) {}

  void list(int64_t row, Buffer<float>& scratch) {
    constexpr int W = A::kWidth;
    const int64_t dim = this->dim_, whole = dim / W * W;
    float* const context = scratch.get();
    for (int64_t k = 0; k < dim; ++k)
      context[k] = to_float(static_cast<const T*>(x_.rows)[row * dim + k]);
    for (int64_t e = x_.lists.offsets[row]; e < x_.lists.offsets[row + 1]; ++e) {
      this->prefetch(e + kPrefetched);
      const T* item = this->matrix_row(e);
      auto acc = A::set(0.0f);
      for (int64_t k = 0; k < whole; k += W)
        acc = A::fma(A::load(context + k), load_values<A>(item + k), acc);
      float dot = sum_of<A>(acc);
      for (int64_t k = whole; k < dim; ++k) dot += context[k] * to_float(item[k]);
      x_.dots[e] = dot;
    }
  }

private:
  const ListDots& x_;
};

template <class A, class T>
class Sums : public ListTasks<T, Sums<A, T>> {
public:
  Sums(const ListSums& x, Workers& workers)
      : ListTasks<T, Sums>(x.lists, x.matrix, x.dim, workers), x_(x) {}

  void list(int64_t row, Buffer<float>& scratch) {
    constexpr int W = A::kWidth;
    const int64_t dim = this->dim_, whole = dim / W * W, end = x_.lists.offsets[row + 1];
    float* const part = scratch.get();
    float* const sum = x_.sums + row * dim;
    for (int64_t k = 0; k < dim; ++k) sum[k] = 0.0f;
    for (int64_t begin = x_.lists.offsets[row]; begin < end; begin += kSummed) {
      for (int64_t k = 0; k < dim; ++k) part[k] = 0.0f;
      for (int64_t e = begin; e < min(begin + kSummed, end); ++e) {
        this->prefetch(e + kPrefetched);
        const T* item = this->matrix_row(e);
        const float weight = x_.weight[e];
        const auto weights = A::set(weight);
        for (int64_t k = 0; k < whole; k += W)
          A::store(part + k, A::fma(weights, load_values<A>(item + k), A::load(part + k)));
        for (int64_t k = whole; k < dim; ++k) part[k] += weight * to_float(item[k]);
      }
      for (int64_t k = 0; k < dim; ++k) sum[k] += part[k];
    }
  }

private:
  const ListSums& x_;
};

template <class A, class T>
bool list_dots(const ListDots& x, Workers& workers) {
  return Dots<A, T>(x, workers).run();
}

template <class A, class T>
bool list_sums(const ListSums& x, Workers& workers) {
  return Sums<A, T>(x, workers).run();
}

} // namespace
} // namespace offtower::cpu
