// Checks and launch of linear_assignment on the GPU; registers key CUDA.

#include <optional>
#include <vector>

#include "../cuda_common.h"
#include "linear_assignment.cuh"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void launch(const AssignmentBatch& batch, const Tensor& cost, const Tensor& num_targets, Tensor& result) {
  const AssignmentPlan plan = plan_assignment<T>(batch);
  std::optional<Tensor> workspace;
  if (!plan.in_shared_memory) {
    const int64_t bytes = batch.problems * static_cast<int64_t>(plan.workspace_bytes);
    workspace = torch::stable::new_empty(cost, {bytes}, ScalarType::Byte);
  }
  STD_CUDA_CHECK(launch_assignment(
      plan, batch, cost.const_data_ptr<T>(), num_targets.const_data_ptr<int64_t>(), result.mutable_data_ptr<int64_t>(),
      workspace ? workspace->mutable_data_ptr() : nullptr, current_stream(cost.get_device_index())));
}

Tensor linear_assignment(const Tensor& cost_argument, const Tensor& num_targets_argument) {
  Tensor cost = cost_argument, num_targets = num_targets_argument;
  const int64_t leading = cost.dim() - 2;
  STD_TORCH_CHECK(leading >= 0, "linear_assignment: cost must have at least 2 dimensions");
  STD_TORCH_CHECK(cost.scalar_type() == ScalarType::Float || cost.scalar_type() == ScalarType::Double,
                  "linear_assignment: cost must be float32 or float64");
  STD_TORCH_CHECK(num_targets.scalar_type() == ScalarType::Long, "linear_assignment: num_targets must be int64");
  STD_TORCH_CHECK(num_targets.is_cuda() && num_targets.get_device_index() == cost.get_device_index(),
                  "linear_assignment: num_targets must lie on the device of cost");
  STD_TORCH_CHECK(num_targets.dim() == leading, "linear_assignment: num_targets must have the leading shape of cost");
  std::vector<int64_t> shape;
  int64_t problems = 1;
  for (int64_t dim = 0; dim < leading; ++dim) {
    STD_TORCH_CHECK(num_targets.size(dim) == cost.size(dim),
                    "linear_assignment: num_targets must have the leading shape of cost");
    shape.push_back(cost.size(dim));
    problems *= cost.size(dim);
  }
  const int64_t targets = cost.size(leading), queries = cost.size(leading + 1);
  STD_TORCH_CHECK(targets <= INT32_MAX && queries <= INT32_MAX, "linear_assignment: a problem is too large");
  STD_TORCH_CHECK(problems <= INT32_MAX, "linear_assignment: there are too many problems");
  shape.push_back(targets);

  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  Tensor result = torch::stable::new_empty(cost, shape, ScalarType::Long);
  if (problems == 0 || targets == 0) return result;
  AssignmentBatch batch = {};
  batch.problems = static_cast<int32_t>(problems);
  batch.targets = static_cast<int32_t>(targets);
  batch.queries = static_cast<int32_t>(queries);
  const bool queries_contiguous = queries <= 1 || cost.stride(leading + 1) == 1;
  if (!queries_contiguous || leading > kMaxLeadingDims) cost = torch::stable::contiguous(cost);
  batch.target_stride = cost.stride(leading);
  if (leading > kMaxLeadingDims) {
    num_targets = torch::stable::contiguous(num_targets);
    batch.leading_dims = 1;
    batch.leading_sizes[0] = batch.problems;
    batch.cost_strides[0] = targets * queries;
    batch.num_targets_strides[0] = 1;
  } else {
    batch.leading_dims = static_cast<int32_t>(leading);
    for (int64_t dim = 0; dim < leading; ++dim) {
      batch.leading_sizes[dim] = static_cast<int32_t>(cost.size(dim));
      batch.cost_strides[dim] = cost.stride(dim);
      batch.num_targets_strides[dim] = num_targets.stride(dim);
    }
  }
  if (cost.scalar_type() == ScalarType::Float) {
    launch<float>(batch, cost, num_targets, result);
  } else {
    launch<double>(batch, cost, num_targets, result);
  }
  return result;
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CUDA, m) {
  m.impl("linear_assignment", TORCH_BOX(&groupdetr::linear_assignment));
}
