// What every kernel file of this package uses from torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>

namespace groupdetr {

// Element offset of entry `index`, counted row by row over a tensor's first `dims` dimensions.
inline int64_t leading_offset(int64_t index, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t offset = 0;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    offset += index % sizes[dim] * strides[dim];
    index /= sizes[dim];
  }
  return offset;
}

// Calls the reference of an op, which is an op of its own; the results stay in the stack that is returned.
template <typename... Arguments>
auto call_reference(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace groupdetr
