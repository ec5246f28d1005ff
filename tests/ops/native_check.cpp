// Compares every instruction set that the machine runs with plain loops in float64: without Python, so
// that it also runs under an emulator. Prints one line per failure; the exit status is their number.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/instruction_sets.h"

using namespace offtower;
using namespace offtower::cpu;

namespace {

int failures = 0;
bool never() { return false; }

struct Shape {
  int64_t rows, items, dim;
};

// An array in float32 or bfloat16, and the same values in float64.
struct Array {
  Array(int64_t count, double scale, DType dtype, std::mt19937& random) : values(count) {
    std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
    narrow.resize(count);
    wide.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      wide[i] = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &wide[i], sizeof(bits));
      narrow[i] = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::bfloat16) bits &= 0xffff0000u;
      std::memcpy(&wide[i], &bits, sizeof(bits));
      values[i] = wide[i];
    }
    data = dtype == DType::bfloat16 ? static_cast<const void*>(narrow.data()) : wide.data();
  }
  std::vector<double> values;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  const void* data;
};

std::vector<double> read(const std::vector<float>& array, DType dtype, size_t count) {
  std::vector<double> found(count);
  for (size_t i = 0; i < count; ++i) {
    float value;
    uint16_t half;
    std::memcpy(&half, reinterpret_cast<const char*>(array.data()) + 2 * i, sizeof(half));
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, sizeof(value));
    found[i] = dtype == DType::bfloat16 ? value : array[i];
  }
  return found;
}

void compare(const std::string& what, const std::vector<double>& found,
             const std::vector<double>& truth, double bound) {
  double largest = 0.0, error = 0.0;
  for (double x : truth) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < truth.size(); ++i) {
    const double difference = std::fabs(found[i] - truth[i]);
    error = difference <= error ? error : difference; // a NaN stays
  }
  if (error <= bound * largest) return;
  ++failures;
  std::printf("%s: error %.3g of at most %.3g\n", what.c_str(), error, bound * largest);
}

struct Truth {
  std::vector<double> log_prob, expected, entropy, context, item, bias;
};

// loss = sum_i w_i (log_prob_i + 0.7 expected_i + 0.3 entropy_i)
Truth enumerate(const Shape& n, const Array& u, const Array& v, const Array& b, const Array& e,
                const Array& t, const std::vector<int64_t>& action, const std::vector<float>& w,
                bool is_sigmoid, const std::vector<uint64_t>& bitmap) {
  Truth out;
  out.context.resize(n.rows * n.dim);
  out.item.resize(n.items * n.dim);
  out.bias.resize(n.items);
  std::vector<double> s(n.items), q(n.items), p(n.items);
  const auto dot = [&](const Array& x, const Array& y, int64_t i, int64_t j) {
    double sum = 0.0;
    for (int64_t k = 0; k < n.dim; ++k) sum += x.values[i * n.dim + k] * y.values[j * n.dim + k];
    return sum;
  };
  for (int64_t i = 0; i < n.rows; ++i) {
    double top = -INFINITY, total = 0.0, expected = 0.0, entropy = 0.0;
    for (int64_t j = 0; j < n.items; ++j) {
      const bool may = bitmap.empty() || (bitmap[j / 64] >> (j % 64) & 1) != 0;
      s[j] = may ? dot(u, v, i, j) + b.values[j] : -INFINITY;
      q[j] = dot(e, t, i, j);
      if (is_sigmoid) q[j] = 1.0 / (1.0 + std::exp(-q[j]));
      top = std::fmax(top, s[j]);
    }
    for (int64_t j = 0; j < n.items; ++j) total += std::exp(s[j] - top);
    const double log_total = top + std::log(total);
    for (int64_t j = 0; j < n.items; ++j) {
      p[j] = std::exp(s[j] - log_total);
      expected += p[j] * q[j];
      if (p[j] > 0.0) entropy -= p[j] * (s[j] - log_total);
    }
    out.log_prob.push_back(s[action[i]] - log_total);
    out.expected.push_back(expected);
    out.entropy.push_back(entropy);
    for (int64_t j = 0; j < n.items; ++j) {
      const double log_p = p[j] > 0.0 ? s[j] - log_total : 0.0;
      const double ds = w[i] * ((j == action[i]) - p[j] + 0.7 * p[j] * (q[j] - expected) -
                                0.3 * p[j] * (log_p + entropy));
      out.bias[j] += ds;
      for (int64_t k = 0; k < n.dim; ++k) {
        out.context[i * n.dim + k] += ds * v.values[j * n.dim + k];
        out.item[j * n.dim + k] += ds * u.values[i * n.dim + k];
      }
    }
  }
  return out;
}

void check(const InstructionSet& set, const Shape& n, DType dtype, bool is_sigmoid, bool masked) {
  std::mt19937 random(static_cast<uint32_t>(n.rows * 7 + n.items));
  const double scale = std::pow(static_cast<double>(n.dim), -0.25) * 1.5;
  const Array u(n.rows * n.dim, scale, dtype, random), v(n.items * n.dim, scale, dtype, random);
  const Array e(n.rows * n.dim, scale, dtype, random), t(n.items * n.dim, scale, dtype, random);
  const Array b(n.items, 1.0, dtype, random);
  std::vector<int64_t> action(n.rows);
  std::vector<uint64_t> bitmap(masked ? (n.items + 63) / 64 : 0, 0x5b5b5b5b5b5b5b5bull);
  std::vector<int32_t> group(n.rows, 0);
  for (int64_t& a : action) // the bitmap has bits 0, 1, 3 and 4 of each byte, so multiples of 8
    a = static_cast<int64_t>(random() % n.items) / 8 * 8;
  std::vector<float> w(n.rows);
  for (float& x : w) x = static_cast<float>(random() % 100) / 50.0f - 0.9f;
  const Truth truth = enumerate(n, u, v, b, e, t, action, w, is_sigmoid, bitmap);

  PolicyOperands o{};
  o.dtype = dtype;
  o.rows = n.rows;
  o.items = n.items;
  o.dim = o.reward_dim = n.dim;
  o.context = u.data;
  o.item = v.data;
  o.item_bias = b.data;
  o.action = action.data();
  o.temperature = 1.0f;
  o.reward = is_sigmoid ? RewardKind::sigmoid : RewardKind::identity;
  o.reward_context = e.data;
  o.reward_item = t.data;
  if (masked) {
    o.eligible.group = group.data();
    o.eligible.groups = 1;
    o.eligible.words = static_cast<int64_t>(bitmap.size());
    o.eligible.bitmap = bitmap.data();
  }
  std::vector<std::vector<float>> of_rows(7, std::vector<float>(n.rows));
  ForwardResults forward{};
  forward.log_prob = of_rows[0].data();
  forward.expected_reward = of_rows[1].data();
  forward.entropy = of_rows[2].data();
  forward.reference_max = of_rows[3].data();
  forward.total = of_rows[4].data();
  for (int i = 0; i < n.rows; ++i) {
    of_rows[5][i] = 0.7f * w[i];
    of_rows[6][i] = 0.3f * w[i];
  }
  BackwardOperands in{};
  in.policy = o;
  in.reference_max = forward.reference_max;
  in.total = forward.total;
  in.expected_reward = forward.expected_reward;
  in.entropy = forward.entropy;
  in.cotangents = {w.data(), nullptr, of_rows[5].data(), of_rows[6].data()};
  std::vector<float> context(n.rows * n.dim), item(n.items * n.dim), bias(n.items);
  const BackwardResults gradients{context.data(), item.data(), bias.data()};
  std::vector<float> score(n.rows * 3);
  std::vector<int64_t> index(n.rows * 3);
  const Kernels& kernels = set.of(dtype);
  Workers workers(2, never);
  kernels.forward(o, forward, workers);
  kernels.backward(in, gradients, workers);
  kernels.top_k(o, {3, score.data(), index.data()}, workers);

  const bool is_half = dtype == DType::bfloat16;
  const std::string name = std::string(set.name) + (is_half ? " bfloat16" : " float32") +
                           (is_sigmoid ? " sigmoid" : " identity") + (masked ? " masked" : "") +
                           " B=" + std::to_string(n.rows) + " N=" + std::to_string(n.items) +
                           " d=" + std::to_string(n.dim) + ": ";
  const auto rows = [&](int i) { return read(of_rows[i], DType::float32, n.rows); };
  compare(name + "log_prob", rows(0), truth.log_prob, 2e-6);
  compare(name + "expected_reward", rows(1), truth.expected, 4e-6);
  compare(name + "entropy", rows(2), truth.entropy, 4e-6);
  const double bound = is_half ? 1e-2 : 1e-5; // gradients are rounded to the dtype
  compare(name + "gradient of u", read(context, dtype, truth.context.size()), truth.context, bound);
  compare(name + "gradient of v", read(item, dtype, truth.item.size()), truth.item, bound);
  compare(name + "gradient of bias", read(bias, dtype, truth.bias.size()), truth.bias, bound);
  for (int64_t i = 0; i < n.rows; ++i)
    if (score[3 * i] < score[3 * i + 1] || score[3 * i + 1] < score[3 * i + 2]) {
      ++failures;
      std::printf("%stop_k is not sorted in row %d\n", name.c_str(), static_cast<int>(i));
    }
}

} // namespace

int main() {
  const Shape shapes[] = {{1, 9, 1}, {5, 70, 3}, {17, 333, 33}, {131, 500, 64}, {40, 97, 130}};
  for (const InstructionSet* set : built_sets()) {
    if (!set->is_supported()) continue;
    std::printf("%s\n", set->name);
    for (const Shape& shape : shapes)
      for (DType dtype : {DType::float32, DType::bfloat16})
        for (bool is_sigmoid : {false, true})
          for (bool masked : {false, true}) check(*set, shape, dtype, is_sigmoid, masked);
  }
  return failures > 99 ? 99 : failures;
}
