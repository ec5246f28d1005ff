// Operands laid out for the products, and the logits of a few items for a block of contexts.
//
// A = arithmetic, T = element type in memory. A block is kBlock contexts, one a lane of kColumns
// registers; lanes beyond the last row hold zeros.
#pragma once

#include "../buffer.h"
#include "../../operands.h"
#include "exponential.h"
#include "product.h"

namespace offtower::cpu {
namespace {

template <class A>
constexpr int kBlock = A::kWidth * A::kColumns;

template <class A, int M>
using Registers = typename A::F[M][A::kColumns];

// One unit of float32 contexts is divided by the temperature; bfloat16 ones stay as they are.
OFFTOWER_INLINE float divided(float unit, float divisor) {
  return divisor == 1.0f ? unit : unit / divisor;
}
OFFTOWER_INLINE uint32_t divided(uint32_t unit, float) { return unit; }

// Rows of a matrix across lanes: [block][unit][lane].
template <class A, class T>
void pack_blocks(const T* matrix, int64_t rows, int64_t dim, float divisor,
                 Buffer<typename A::Unit>& out) {
  constexpr int L = kBlock<A>;
  const int64_t depth = ceil_div(dim, A::kPair);
  out.resize(ceil_div(rows, L) * depth * L);
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = matrix + row * dim;
    typename A::Unit* target = out.get() + row / L * depth * L + row % L;
    for (int64_t k = 0; k < depth; ++k) {
      const bool pair = A::kPair == 2 && k * 2 + 1 < dim;
      target[k * L] =
          divided(A::pack(source[k * A::kPair], pair ? source[k * 2 + 1] : T{}), divisor);
    }
  }
}

// Rows of a matrix as the right operand of a product that sums over them: panels of kBlock columns, the
// last one padded to whole registers with the zeros that are there. A panel is [row unit][column] with
// room for `room` row units, so that a product reads it from one end to the other: rows at a stride of
// a power of two would compete for few sets of the first-level cache.
template <class A, class T>
void pack_panels(const T* matrix, int64_t rows, int64_t dim, float divisor, int64_t room,
                 typename A::Unit* out) {
  for (int64_t begin = 0; begin < dim; begin += kBlock<A>, out += room * kBlock<A>) {
    const int64_t count = min(kBlock<A>, dim - begin);
    const int64_t width = ceil_div(count, A::kWidth) * A::kWidth;
    for (int64_t row = 0; row < rows; row += A::kPair) {
      const T* __restrict__ const first = matrix + row * dim + begin;
      typename A::Unit* __restrict__ const to = out + row / A::kPair * width;
      const auto pack = [&](int64_t columns) OFFTOWER_INLINE_LAMBDA {
        if (A::kPair == 2 && row + 1 < rows) {
          for (int64_t k = 0; k < columns; ++k) to[k] = A::pack(first[k], first[dim + k]);
        } else if (divisor == 1.0f) {
          for (int64_t k = 0; k < columns; ++k) to[k] = A::pack(first[k], T{});
        } else {
          for (int64_t k = 0; k < columns; ++k) to[k] = divided(A::pack(first[k], T{}), divisor);
        }
      };
      if (count == kBlock<A>)
        pack(kBlock<A>); // without a remainder, the loop is a few copies of registers
      else
        pack(count);
    }
  }
}

template <class A, class T>
struct Problem {
  explicit Problem(const PolicyOperands& operands)
      : o(operands), depth(ceil_div(o.dim, A::kPair)), blocks(ceil_div(o.rows, kBlock<A>)),
        factored(o.reward == RewardKind::identity || o.reward == RewardKind::sigmoid),
        reward_depth(factored ? ceil_div(o.reward_dim, A::kPair) : 0),
        divisor(A::kPair == 1 ? o.temperature : 1.0f),
        scale(A::kPair == 1 ? 1.0f : 1.0f / o.temperature) {
    pack_blocks<A, T>(static_cast<const T*>(o.context), o.rows, o.dim, divisor, context);
    if (factored)
      pack_blocks<A, T>(static_cast<const T*>(o.reward_context), o.rows, o.reward_dim, 1.0f,
                        reward_context);
  }

  const typename A::Unit* block(int64_t b) const { return context.get() + b * depth * kBlock<A>; }
  const typename A::Unit* reward_block(int64_t b) const {
    return reward_context.get() + b * reward_depth * kBlock<A>;
  }

  const PolicyOperands& o;
  const int64_t depth, blocks; // depth: units along the embedding's dimension
  const bool factored;
  const int64_t reward_depth;
  const float divisor; // float32 products have the temperature in the packed contexts,
  const float scale;   // bfloat16 ones apply it to the sum
  Buffer<typename A::Unit> context, reward_context;
};

// Rows of a matrix over items as units: in place where the memory layout allows it.
template <class A, class T>
class ItemRows {
public:
  using Unit = typename A::Unit;

  ItemRows(const void* matrix, int64_t dim, int64_t most)
      : matrix_(static_cast<const T*>(matrix)), dim_(dim), stride_(ceil_div(dim, A::kPair)),
        in_place_(sizeof(T) * A::kPair == sizeof(Unit) && dim % A::kPair == 0) {
    if (!in_place_) copy_.resize(most * stride_);
  }

  const Unit* load(int64_t begin, int64_t count) {
    const T* source = matrix_ + begin * dim_;
    if (in_place_) return reinterpret_cast<const Unit*>(source);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < stride_; ++k) {
        const bool pair = A::kPair == 2 && k * 2 + 1 < dim_;
        copy_[i * stride_ + k] =
            A::pack(source[i * dim_ + k * A::kPair], pair ? source[i * dim_ + k * 2 + 1] : T{});
      }
    return copy_.get();
  }
  int64_t stride() const { return stride_; }

private:
  const T* matrix_;
  const int64_t dim_, stride_;
  const bool in_place_;
  Buffer<Unit> copy_;
};

// One float an item; null where there is no array.
template <class T>
class ItemNumbers {
public:
  ItemNumbers(const void* array, int64_t most)
      : array_(static_cast<const T*>(array)), copy_(array == nullptr ? 0 : most) {}

  const float* load(int64_t begin, int64_t count) {
    if (array_ == nullptr) return nullptr;
    for (int64_t i = 0; i < count; ++i) copy_[i] = to_float(array_[begin + i]);
    return copy_.get();
  }

private:
  const T* array_;
  Buffer<float> copy_;
};

// A tile of items: embeddings, biases and their side of the reward model.
template <class A, class T>
struct ItemTile {
  ItemTile(const Problem<A, T>& problem, int64_t most)
      : row_source(problem.o.item, problem.o.dim, most), bias_source(problem.o.item_bias, most),
        reward_source(problem.o.reward_item, problem.o.reward_dim, problem.factored ? most : 0),
        reward_bias_source(problem.o.reward_bias, problem.factored ? most : 0),
        factored(problem.factored) {}

  void load(int64_t begin_item, int64_t item_count) {
    begin = begin_item;
    count = item_count;
    rows = row_source.load(begin, count);
    bias = bias_source.load(begin, count);
    if (!factored) return;
    reward_rows = reward_source.load(begin, count);
    reward_bias = reward_bias_source.load(begin, count);
  }

  int64_t begin = 0, count = 0;
  const typename A::Unit* rows = nullptr;
  const float* bias = nullptr; // null without an item bias
  const typename A::Unit* reward_rows = nullptr;
  const float* reward_bias = nullptr;
  const float* bias_at(int64_t item) const { return bias == nullptr ? nullptr : bias + item; }
  const float* reward_bias_at(int64_t item) const {
    return reward_bias == nullptr ? nullptr : reward_bias + item;
  }

  ItemRows<A, T> row_source;
  ItemNumbers<T> bias_source;
  ItemRows<A, T> reward_source;
  ItemNumbers<T> reward_bias_source;
  const bool factored;
};

// <item, context> * scale + bias for M items and a block of V registers. The bias comes last: a product summed on
// top of it would round at the bias's size. Every caller gets the same bits for the same item and
// context, so that a row's target logit is exactly the one inside its normalizer.
template <class A, int M, int V>
OFFTOWER_INLINE void affine(const typename A::Unit* rows, int64_t stride, const float* bias,
                            const typename A::Unit* block, int64_t depth, float scale,
                            typename A::F (&s)[M][V]) {
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) s[m][v] = A::set(0.0f);
  }
  multiply<A, M, V, false>(rows, stride, block, V * A::kWidth, depth, s);
  if (A::kPair == 2 && scale != 1.0f) {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) s[m][v] = A::mul(s[m][v], A::set(scale));
    }
  }
  if (bias == nullptr) return;
  OFFTOWER_UNROLL
  for (int m = 0; m < M; ++m) {
    OFFTOWER_UNROLL
    for (int v = 0; v < V; ++v) s[m][v] = A::add(s[m][v], A::set(bias[m]));
  }
}

// Dense rewards of a block for a tile of items, transposed to [item][lane].
template <class A, class T>
void load_dense(const PolicyOperands& o, int64_t block, int64_t begin, int64_t count, float* out) {
  constexpr int L = kBlock<A>;
  const int64_t first = block * L, lanes = min(L, o.rows - first);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const T* source = static_cast<const T*>(o.dense) + (first + lane) * o.items + begin;
    for (int64_t i = 0; i < count; ++i) out[i * L + lane] = to_float(source[i]);
  }
}

// q of M items for a block: `dense` is the transposed tile's first item, for a dense model.
template <class A, class T, int M>
OFFTOWER_INLINE void rewards(const Problem<A, T>& problem, const ItemTile<A, T>& tile, int64_t item,
                             const typename A::Unit* reward_block, const float* dense,
                             Registers<A, M>& q) {
  constexpr int V = A::kColumns;
  if (!problem.factored) {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) {
      OFFTOWER_UNROLL
      for (int v = 0; v < V; ++v) q[m][v] = A::load(dense + m * kBlock<A> + v * A::kWidth);
    }
    return;
  }
  const int64_t stride = tile.reward_source.stride();
  affine<A, M>(tile.reward_rows + item * stride, stride, tile.reward_bias_at(item), reward_block,
               problem.reward_depth, 1.0f, q);
  if (problem.o.reward == RewardKind::sigmoid) {
    OFFTOWER_UNROLL
    for (int m = 0; m < M; ++m) sigmoid<A, V>(q[m]);
  }
}

} // namespace
} // namespace offtower::cpu
