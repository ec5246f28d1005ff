// Operands and results of an operator: plain pointers and sizes, independent of torch.
//
// Arrays are row-major and contiguous. "rows" are logged contexts, "items" the catalogue.
#pragma once

#include <cstdint>

namespace offtower {

// tfloat32: float32 numbers whose products may round them to 10 bits behind the point (CUDA alone).
enum class DType : int32_t { float32 = 0, bfloat16 = 1, tfloat32 = 2 };
enum class RewardKind : int32_t { none = 0, dense = 1, identity = 2, sigmoid = 3 };

// Lists of item numbers, one a row: row i has items[offsets[i]] to items[offsets[i + 1] - 1], rising.
struct ItemLists {
  int64_t rows;
  const int64_t* offsets; // (rows + 1,); null if there are no lists
  const int64_t* items;
};

// The items that each row may choose: those in the bitmap of its group, if there is one, that are not
// excluded. All others have a logit of -inf.
struct Eligibility {
  const int32_t* group; // (rows,) or null
  int64_t groups, words;
  const uint64_t* bitmap; // (groups, words): bit a % 64 of word a / 64 is item a
  ItemLists excluded;

  bool restricts() const { return bitmap != nullptr || excluded.offsets != nullptr; }
};

// Logits s_ij = <context_i, item_j> / temperature + item_bias_j, and a frozen reward model q_ij.
struct PolicyOperands {
  DType dtype;
  int64_t rows, items, dim;
  const void* context;   // (rows, dim)
  const void* item;      // (items, dim)
  const void* item_bias; // (items,) or null
  const int64_t* action; // (rows,); -1 where the row's item is not among these; null if none is
  float temperature;

  RewardKind reward;
  const void* dense; // (rows, items)
  int64_t reward_dim;
  const void* reward_context; // (rows, reward_dim)
  const void* reward_item;    // (items, reward_dim)
  const void* reward_bias;    // (items,) or null

  Eligibility eligible;
};

// Products over the entries e of lists, for candidate lists; in the order of the entries.
//
// dots[e] = <rows_i, matrix_a> for the entries (i, a) of the lists.
struct ListDots {
  DType dtype;
  int64_t dim;
  const void* rows;   // (lists.rows, dim)
  const void* matrix; // (?, dim)
  ItemLists lists;
  float* dots;
};
// sums_i = sum of weight[e] matrix_a over the entries e = (i, a) of list i.
struct ListSums {
  DType dtype;
  int64_t dim;
  const float* weight;
  const void* matrix;
  ItemLists lists;
  float* sums; // (lists.rows, dim)
};

// (rows,) float32 each; null where not asked for.
//
// Sums over items are relative to the row's reference_max, its largest logit or up to 1 less (7
// without the entropy):
// total = sum_j exp(s_j - reference_max), reward_sum = sum_j exp(s_j - reference_max) q_j,
// centered_sum = sum_j exp(s_j - reference_max) (s_j - reference_max). Sums over slices of items
// merge exactly.
struct ForwardResults {
  float* log_prob;
  float* log_normalizer;
  float* expected_reward;
  float* action_reward;
  float* entropy;
  float* reference_max;
  float* total;
  float* reward_sum;
  float* centered_sum;
  float* action_logit;
};

// Gradients of the loss in the forward results, (rows,) float32 each; null means zero.
struct Cotangents {
  const float* log_prob;
  const float* log_normalizer;
  const float* expected_reward;
  const float* entropy;
};

struct BackwardOperands {
  PolicyOperands policy;
  const float*
      reference_max; // of the forward pass; over all slices of items where there are several
  const float* total;
  const float* expected_reward; // null without its cotangent, and so is entropy
  const float* entropy;
  Cotangents cotangents;
};

// In the operands' dtype and shape; null where not asked for, and then not computed.
struct BackwardResults {
  void* context;
  void* item;
  void* item_bias;
};

struct TopKResults {
  int64_t k;
  float* score;   // (rows, k), falling; -inf beyond the number of eligible items
  int64_t* index; // (rows, k); of equal scores the lowest comes first; -1 beyond that number
};

constexpr int64_t kTileUnit =
    192; // of a tile: whole words of a bitmap, and whole folds of the kernels

// Independent draws from the softmax of each row, or draws without replacement (Plackett-Luce).
//
// Draw j of a row uses the random numbers of (seed, stream of the row, j) alone. A row with fewer than
// `count` items of positive probability ends with -1 and -inf; without any, or with a logit that is NaN
// or inf, it has nothing else.
struct DrawResults {
  int64_t count;
  bool replacement;
  uint64_t seed;
  int64_t tile;          // items of a tile: a tile is drawn first, then an item of it
  const int64_t* stream; // (rows,)
  int64_t* index;        // (rows, count)
  float* log_prob;       // (rows, count), of one draw from all items
  float* reference_max;  // (rows,), as in ForwardResults
  float* total;          // (rows,)
};

} // namespace offtower
