// What linear_assignment requires of its arguments on every device.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace groupdetr {

struct AssignmentSizes {
  std::vector<int64_t> result;  // the shape [..., targets]
  int64_t leading_dims;         // number of dimensions in [...]
  int64_t problems, targets, queries;
};

// Checks cost [..., targets, queries] and num_targets [...]; returns their sizes.
inline AssignmentSizes check_assignment(const torch::stable::Tensor& cost, const torch::stable::Tensor& num_targets) {
  using torch::headeronly::ScalarType;
  const int64_t leading = cost.dim() - 2;
  STD_TORCH_CHECK(leading >= 0, "linear_assignment: cost must have at least 2 dimensions");
  STD_TORCH_CHECK(cost.scalar_type() == ScalarType::Float || cost.scalar_type() == ScalarType::Double,
                  "linear_assignment: cost must be float32 or float64");
  STD_TORCH_CHECK(num_targets.scalar_type() == ScalarType::Long, "linear_assignment: num_targets must be int64");
  STD_TORCH_CHECK(num_targets.is_cuda() == cost.is_cuda() && num_targets.get_device_index() == cost.get_device_index(),
                  "linear_assignment: num_targets must lie on the device of cost");
  STD_TORCH_CHECK(num_targets.dim() == leading, "linear_assignment: num_targets must have the leading shape of cost");
  AssignmentSizes sizes = {{}, leading, 1, cost.size(leading), cost.size(leading + 1)};
  for (int64_t dim = 0; dim < leading; ++dim) {
    STD_TORCH_CHECK(num_targets.size(dim) == cost.size(dim),
                    "linear_assignment: num_targets must have the leading shape of cost");
    sizes.result.push_back(cost.size(dim));
    sizes.problems *= cost.size(dim);
  }
  STD_TORCH_CHECK(sizes.targets <= INT32_MAX && sizes.queries <= INT32_MAX,
                  "linear_assignment: a problem is too large");
  sizes.result.push_back(sizes.targets);
  return sizes;
}

}  // namespace groupdetr
