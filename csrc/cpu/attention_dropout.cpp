// Dropout of blocks of attention probabilities on the CPU.

#include "../attention_dropout.h"

#include <vector>

#include "../common.h"
#include "simd.h"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 1 << 14;

template <typename T>
void drop(const Tensor& probabilities, uint64_t seed, double p, const std::vector<int64_t>& origins,
          const Tensor& out) {
  const int64_t heads = probabilities.size(1), rows = probabilities.size(2), columns = probabilities.size(3);
  const T* from = probabilities.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const T scale = static_cast<T>(1 / (1 - p));
  const uint32_t threshold = dropout_threshold(p);
  const int64_t all_rows = probabilities.size(0) * heads * rows;
  torch::stable::parallel_for(0, all_rows, 1 + kElementsPerThread / columns, [&](int64_t begin, int64_t end) {
    with_simd([&]<int kBytes>() __attribute__((always_inline)) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t* origin = origins.data() + index / (heads * rows) * 3;
        const int64_t head = origin[0] * heads + index / rows % heads;
        const DropoutRow row =
            dropout_row(seed, static_cast<uint32_t>(head), static_cast<uint32_t>(origin[1] + index % rows));
        const uint32_t first_column = static_cast<uint32_t>(origin[2]);
        const T* source = from + index * columns;
        T* target = to + index * columns;
#pragma GCC ivdep
        for (int64_t c = 0; c < columns; ++c) {
          const T scaled = source[c] * scale;
          target[c] = dropout_keep(row, first_column + static_cast<uint32_t>(c), threshold) ? scaled : T(0);
        }
      }
    });
  });
}

Tensor attention_dropout(const Tensor& probabilities, const Tensor& seed, double p, std::vector<int64_t> origins) {
  STD_TORCH_CHECK(probabilities.is_cpu() && seed.is_cpu(), "attention_dropout: tensors must be on the CPU");
  STD_TORCH_CHECK(probabilities.dim() == 4, "attention_dropout: probabilities must have 4 dimensions");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "attention_dropout: seed must be one int64");
  STD_TORCH_CHECK(p >= 0 && p < 1, "attention_dropout: p must be in [0, 1)");
  STD_TORCH_CHECK(static_cast<int64_t>(origins.size()) == 3 * probabilities.size(0),
                  "attention_dropout: origins must hold three numbers per block");
  const Tensor source = torch::stable::contiguous(probabilities);
  const Tensor out = torch::stable::new_empty(source, source.sizes());
  if (source.numel() == 0) return out;
  const uint64_t bits = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const bool is_double = source.scalar_type() == ScalarType::Double;
  is_double ? drop<double>(source, bits, p, origins, out) : drop<float>(source, bits, p, origins, out);
  return out;
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CPU, m) {
  m.impl("attention_dropout", TORCH_BOX(&groupdetr::attention_dropout));
}
