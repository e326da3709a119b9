// The plan and the launcher of csrc/cuda/linear_assignment.cuh as C functions.

#include <cstdlib>

#include "cuda/linear_assignment.cuh"

namespace {

template <typename T>
int solve(const groupdetr::AssignmentBatch* batch, const groupdetr::AssignmentDevice* device, bool shared_costs,
          const T* cost, const int64_t* num_targets, int64_t* result) {
  const groupdetr::AssignmentPlan plan = groupdetr::plan_assignment<T>(*batch, *device, shared_costs);
  static bool is_allowed = false;  // once, as on a GPU
  if (!is_allowed) {
    const cudaError_t error = groupdetr::allow_shared_costs<T>(*device);
    if (error != cudaSuccess) return error;
    is_allowed = true;
  }
  void* workspace = plan.in_shared_memory ? nullptr : std::malloc(batch->problems * plan.workspace_bytes);
  const cudaError_t error = groupdetr::launch_assignment(plan, *batch, cost, num_targets, result, workspace, nullptr);
  std::free(workspace);
  return error;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int linear_assignment_float32(const groupdetr::AssignmentBatch* batch, const groupdetr::AssignmentDevice* device,
                                     bool shared_costs, const float* cost, const int64_t* num_targets,
                                     int64_t* result) {
  return solve(batch, device, shared_costs, cost, num_targets, result);
}
EXPORT int plan_float32(const groupdetr::AssignmentBatch* batch, const groupdetr::AssignmentDevice* device,
                        bool shared_costs, groupdetr::AssignmentPlan* plan) {
  *plan = groupdetr::plan_assignment<float>(*batch, *device, shared_costs);
  return cudaSuccess;
}

#if !defined(FLOAT32_ONLY)
EXPORT int linear_assignment_float64(const groupdetr::AssignmentBatch* batch, const groupdetr::AssignmentDevice* device,
                                     bool shared_costs, const double* cost, const int64_t* num_targets,
                                     int64_t* result) {
  return solve(batch, device, shared_costs, cost, num_targets, result);
}
EXPORT int plan_float64(const groupdetr::AssignmentBatch* batch, const groupdetr::AssignmentDevice* device,
                        bool shared_costs, groupdetr::AssignmentPlan* plan) {
  *plan = groupdetr::plan_assignment<double>(*batch, *device, shared_costs);
  return cudaSuccess;
}
#endif
