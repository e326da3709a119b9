// Sigmoid focal loss on the CPU. Logits are copied in blocks into a buffer, so that one loop over contiguous numbers
// serves every dtype and every layout; the few whose class is present stand apart in a buffer of their own.

#include "../sigmoid_focal_loss.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common.h"
#include "simd.h"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBuffer = 2048;  // logits; both buffers stay in the first cache
constexpr int64_t kLogitsPerThread = 1 << 14;

// Rows of logits [..., Q, C] and their target classes [..., Q].
struct Rows {
  Tensor logits, targets;
  int64_t problems, queries, classes;
  int64_t query_stride, class_stride, target_stride;

  Rows(const Tensor& logits, const Tensor& targets)
      : logits(logits),
        targets(targets),
        problems(1),
        queries(logits.size(leading())),
        classes(logits.size(leading() + 1)),
        query_stride(logits.stride(leading())),
        class_stride(logits.stride(leading() + 1)),
        target_stride(targets.stride(leading())) {
    for (int64_t dim = 0; dim < leading(); ++dim) problems *= logits.size(dim);
  }

  int64_t leading() const { return logits.dim() - 2; }
  int64_t logits_of(int64_t problem) const {
    return leading_offset(problem, leading(), logits.sizes().data(), logits.strides().data());
  }
  int64_t targets_of(int64_t problem) const {
    return leading_offset(problem, leading(), targets.sizes().data(), targets.strides().data());
  }
  // Rows of a block, and classes of one of its rows that fit the buffer at once.
  int64_t block_rows() const { return std::max<int64_t>(1, kBuffer / classes); }
  int64_t block_classes() const { return std::min(kBuffer, classes); }
  int64_t blocks() const { return (queries + block_rows() - 1) / block_rows(); }
};

// Classes [begin, end) of consecutive rows of one image.
template <typename L>
struct Block {
  const L* logits;  // of the first row and class 0
  const int64_t* targets;
  int64_t rows, begin, end;
};

template <typename T>
struct Buffer {
  alignas(64) T absent[kBuffer], present[kBuffer];  // the logits, for present classes negated
  int64_t num_absent, num_present;
};

// Copies the logits of the rows that count. A target that is neither a class nor one of the two other values makes its
// row NaN.
template <typename T, typename L>
ALWAYS_INLINE void gather(const Rows& rows, const Block<L>& block, Buffer<T>& buffer) {
  constexpr T kCertainlyAbsent = static_cast<T>(-1e30);  // its loss is 0
  const int64_t columns = block.end - block.begin;
  int64_t num_absent = 0, num_present = 0;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t target = block.targets[row * rows.target_stride];
    if (target == kIgnored) continue;
    const L* from = block.logits + row * rows.query_stride + block.begin * rows.class_stride;
    T* to = buffer.absent + num_absent;
    num_absent += columns;
    if (target < kNoObject || target >= rows.classes) {
      std::fill_n(to, columns, std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(from[c * rows.class_stride]);
    if (target >= block.begin && target < block.end) {
      T& logit = to[target - block.begin];
      buffer.present[num_present++] = -logit;
      logit = kCertainlyAbsent;
    }
  }
  buffer.num_absent = num_absent;
  buffer.num_present = num_present;
}

// The sum in float64, in an order that `count` and the vector length fix.
template <int kBytes, typename T>
ALWAYS_INLINE double sum(const T* numbers, int64_t count) {
  constexpr int kLanes = kBytes / sizeof(double), kSums = 4;
  using Sums = Vector<double, kBytes>;
  Sums sums[kSums] = {};
  int64_t first = 0;
  for (; first + kSums * kLanes <= count; first += kSums * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) {
      Vector<T, kLanes * sizeof(T)> values;
      load(values, numbers + first + k * kLanes);
      sums[k] += __builtin_convertvector(values, Sums);
    }
  }
  const Sums folded = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += folded[lane];
  for (; first < count; ++first) total += static_cast<double>(numbers[first]);
  return total;
}

template <bool kSquare, int kBytes, typename T>
ALWAYS_INLINE double total_loss(T* logits, int64_t count, T gamma) {
  for (int64_t i = 0; i < count; ++i) logits[i] = focal_loss<kSquare>(logits[i], gamma);
  return sum<kBytes>(logits, count);
}

// Replaces the logits by their gradients.
template <bool kSquare, typename T>
ALWAYS_INLINE void differentiate(T* logits, int64_t count, T gamma, T factor) {
  for (int64_t i = 0; i < count; ++i) logits[i] = factor * focal_loss_derivative<kSquare>(logits[i], gamma);
}

// Writes what gather read: the gradients of a block to rows of `classes` numbers; 0 to rows that do not count.
template <typename T, typename L>
ALWAYS_INLINE void scatter(const Rows& rows, const Block<L>& block, const Buffer<T>& buffer, L* grads) {
  const int64_t columns = block.end - block.begin;
  const T *absent = buffer.absent, *present = buffer.present;
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t target = block.targets[row * rows.target_stride];
    L* to = grads + row * rows.classes + block.begin;
    if (target == kIgnored) {
      std::fill_n(to, columns, static_cast<L>(0));
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<L>(absent[c]);
    absent += columns;
    if (target >= block.begin && target < block.end) to[target - block.begin] = static_cast<L>(*present++);
  }
}

// Calls `body.operator()<kBytes>(block, image, index)` for all blocks, in parallel; `index` counts the blocks of all
// images, and the parts of a row that is longer than the buffer have one index.
template <typename L, class Body>
void for_blocks(const Rows& rows, const Body& body) {
  const L* logits = rows.logits.const_data_ptr<L>();
  const int64_t* targets = rows.targets.const_data_ptr<int64_t>();
  const int64_t block_rows = rows.block_rows(), blocks = rows.blocks();
  const int64_t grain = 1 + kLogitsPerThread / (block_rows * rows.classes);
  torch::stable::parallel_for(0, rows.problems * blocks, grain, [&](int64_t begin, int64_t end) {
    with_simd([&]<int kBytes>() __attribute__((always_inline)) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t problem = index / blocks, first = index % blocks * block_rows;
        Block<L> block = {logits + rows.logits_of(problem) + first * rows.query_stride,
                          targets + rows.targets_of(problem) + first * rows.target_stride,
                          std::min(block_rows, rows.queries - first), 0, 0};
        while (block.end < rows.classes) {
          block.begin = block.end;
          block.end = std::min(block.begin + rows.block_classes(), rows.classes);
          body.template operator()<kBytes>(block, problem, index);
        }
      }
    });
  });
}

// Calls `run.operator()<T, L, kSquare>()` with L the dtype of the logits and T that of the arithmetic.
template <class Run>
void with_types(const Tensor& logits, double gamma, const Run& run) {
  const auto with_dtype = [&]<typename T, typename L>() {
    gamma == 2 ? run.template operator()<T, L, true>() : run.template operator()<T, L, false>();
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return with_dtype.template operator()<float, float>();
    case ScalarType::Double:
      return with_dtype.template operator()<double, double>();
    case ScalarType::Half:
      return with_dtype.template operator()<float, torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return with_dtype.template operator()<float, torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "sigmoid_focal_loss: logits must be float32, float64, float16 or bfloat16");
  }
}

void check(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.is_cpu() && targets.is_cpu(), "sigmoid_focal_loss: all tensors must be on the CPU");
  STD_TORCH_CHECK(logits.dim() >= 2 && targets.dim() == logits.dim() - 1,
                  "sigmoid_focal_loss: logits and target_classes must have shapes [..., Q, C] and [..., Q]");
  for (int64_t dim = 0; dim < targets.dim(); ++dim) {
    STD_TORCH_CHECK(targets.size(dim) == logits.size(dim),
                    "sigmoid_focal_loss: target_classes must have the shape of logits without the classes");
  }
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "sigmoid_focal_loss: target_classes must be int64");
}

Tensor sigmoid_focal_loss(const Tensor& logits, const Tensor& targets, double alpha, double gamma) {
  check(logits, targets);
  const Rows rows(logits, targets);
  const ScalarType dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().begin() + rows.leading());
  if (logits.numel() == 0) return torch::stable::new_zeros(logits, shape, dtype);
  const Tensor loss = torch::stable::new_empty(logits, shape, dtype);
  std::vector<double> partial(rows.problems * rows.blocks());
  with_types(logits, gamma, [&]<typename T, typename L, bool kSquare>() {
    for_blocks<L>(rows, [&]<int kBytes>(const Block<L>& block, int64_t, int64_t index) __attribute__((always_inline)) {
      Buffer<T> buffer;
      gather(rows, block, buffer);
      const T exponent = static_cast<T>(gamma);
      partial[index] += (1 - alpha) * total_loss<kSquare, kBytes>(buffer.absent, buffer.num_absent, exponent) +
                        alpha * total_loss<kSquare, kBytes>(buffer.present, buffer.num_present, exponent);
    });
    T* losses = loss.mutable_data_ptr<T>();
    for (int64_t problem = 0; problem < rows.problems; ++problem) {
      const auto own = partial.begin() + problem * rows.blocks();
      losses[problem] = static_cast<T>(std::accumulate(own, own + rows.blocks(), 0.0));
    }
  });
  return loss;
}

Tensor sigmoid_focal_loss_backward(const Tensor& grad_out, const Tensor& logits, const Tensor& targets, double alpha,
                                   double gamma) {
  check(logits, targets);
  const Rows rows(logits, targets);
  const ScalarType dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == dtype && grad_out.dim() == rows.leading(),
                  "sigmoid_focal_loss_backward: grad_out must be like the result");
  for (int64_t dim = 0; dim < rows.leading(); ++dim) {
    STD_TORCH_CHECK(grad_out.size(dim) == logits.size(dim),
                    "sigmoid_focal_loss_backward: grad_out must have the shape of the result");
  }
  const Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (logits.numel() == 0) return grad_logits;
  const Tensor upstream = torch::stable::contiguous(grad_out);
  with_types(logits, gamma, [&]<typename T, typename L, bool kSquare>() {
    const T* factors = upstream.const_data_ptr<T>();
    L* grads = grad_logits.mutable_data_ptr<L>();
    for_blocks<L>(
        rows, [&]<int kBytes>(const Block<L>& block, int64_t problem, int64_t index) __attribute__((always_inline)) {
          Buffer<T> buffer;
          gather(rows, block, buffer);
          const T exponent = static_cast<T>(gamma), factor = factors[problem];
          differentiate<kSquare>(buffer.absent, buffer.num_absent, exponent, static_cast<T>(1 - alpha) * factor);
          differentiate<kSquare>(buffer.present, buffer.num_present, exponent, static_cast<T>(-alpha) * factor);
          const int64_t first = index % rows.blocks() * rows.block_rows();
          scatter(rows, block, buffer, grads + (problem * rows.queries + first) * rows.classes);
        });
  });
  return grad_logits;
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&groupdetr::sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&groupdetr::sigmoid_focal_loss_backward));
}
