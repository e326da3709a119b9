// What every kernel file of this package uses from torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

}  // namespace groupdetr
