// Checks and launch of linear_assignment on the GPU; registers key CUDA.

#include <array>
#include <mutex>
#include <optional>

#include "../choices.h"
#include "../cuda_common.h"
#include "../linear_assignment_arguments.h"
#include "linear_assignment.cuh"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What find(device index) says, asked once a device.
template <typename Value>
class OfDevice {
 public:
  template <typename Find>
  Value get(int32_t index, const Find& find) {
    if (index < 0 || index >= static_cast<int32_t>(known_.size())) return find(index);
    std::call_once(asked_[index], [&] { known_[index] = find(index); });
    return known_[index];
  }

 private:
  std::array<std::once_flag, 64> asked_;
  std::array<Value, 64> known_;
};

int attribute(cudaDeviceAttr which, int32_t device_index) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_index));
  return value;
}

AssignmentDevice find_device(int32_t index) {
  AssignmentDevice device = {};
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.threads_of_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index);
  device.shared_of_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  device.shared_of_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  // 2 on GPUs for data centres, 32 or 64 on others.
  constexpr int kSlow = 16;
  device.slow_doubles = attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, index) >= kSlow;
  return device;
}

AssignmentDevice device_of(int32_t index) {
  static OfDevice<AssignmentDevice> devices;
  AssignmentDevice device = devices.get(index, find_device);
  const int fixed_point = assignment_fixed_point;
  if (fixed_point >= 0) device.slow_doubles = fixed_point != 0;
  return device;
}

// Whether the driver gives blocks the shared memory for costs. It is the current device that is asked.
template <typename T>
bool allows_shared_costs(int32_t index, const AssignmentDevice& device) {
  static OfDevice<bool> allowed;
  return allowed.get(index, [&device](int32_t) {
    if (allow_shared_costs<T>(device) == cudaSuccess) return true;
    cudaGetLastError();  // so that nobody else takes it for their own
    return false;
  });
}

template <typename T>
void launch(const AssignmentBatch& batch, const Tensor& cost, const Tensor& num_targets, Tensor& result) {
  const int32_t index = cost.get_device_index();
  const AssignmentDevice device = device_of(index);
  AssignmentPlan plan = plan_assignment<T>(batch, device, assignment_shared_costs > 0);
  if (plan.shared_costs && !allows_shared_costs<T>(index, device)) plan = plan_assignment<T>(batch, device, false);
  std::optional<Tensor> workspace;
  if (!plan.in_shared_memory) {
    const int64_t bytes = batch.problems * static_cast<int64_t>(plan.workspace_bytes);
    workspace = torch::stable::new_empty(cost, {bytes}, ScalarType::Byte);
  }
  STD_CUDA_CHECK(launch_assignment(plan, batch, cost.const_data_ptr<T>(), num_targets.const_data_ptr<int64_t>(),
                                   result.mutable_data_ptr<int64_t>(),
                                   workspace ? workspace->mutable_data_ptr() : nullptr, current_stream(index)));
}

Tensor linear_assignment(const Tensor& cost_argument, const Tensor& num_targets_argument) {
  if (!is_served(cost_argument.get_device_index())) {
    const auto stack =
        call_reference("groupdetr_fast::linear_assignment_reference", cost_argument, num_targets_argument);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  Tensor cost = cost_argument, num_targets = num_targets_argument;
  const AssignmentSizes sizes = check_assignment(cost, num_targets);
  STD_TORCH_CHECK(sizes.problems <= INT32_MAX, "linear_assignment: there are too many problems");

  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  Tensor result = torch::stable::new_empty(cost, sizes.result, ScalarType::Long);
  if (sizes.problems == 0 || sizes.targets == 0) return result;
  AssignmentBatch batch = {};
  batch.problems = static_cast<int32_t>(sizes.problems);
  batch.targets = static_cast<int32_t>(sizes.targets);
  batch.queries = static_cast<int32_t>(sizes.queries);
  const int64_t leading = sizes.leading_dims;
  const bool queries_contiguous = sizes.queries <= 1 || cost.stride(leading + 1) == 1;
  if (!queries_contiguous || leading > kMaxLeadingDims) cost = torch::stable::contiguous(cost);
  batch.target_stride = cost.stride(leading);
  if (leading > kMaxLeadingDims) {
    num_targets = torch::stable::contiguous(num_targets);
    batch.leading_dims = 1;
    batch.leading_sizes[0] = batch.problems;
    batch.cost_strides[0] = sizes.targets * sizes.queries;
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
