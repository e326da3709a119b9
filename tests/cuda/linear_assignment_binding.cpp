// The launcher of csrc/cuda/linear_assignment.cuh as C functions.

#include <cstdlib>

#include "cuda/linear_assignment.cuh"

namespace {

template <typename T>
int solve(const groupdetr::AssignmentBatch* batch, const T* cost, const int64_t* num_targets, int64_t* result) {
  const groupdetr::AssignmentPlan plan = groupdetr::plan_assignment<T>(*batch);
  void* workspace = plan.in_shared_memory ? nullptr : std::malloc(batch->problems * plan.workspace_bytes);
  const cudaError_t error = groupdetr::launch_assignment(plan, *batch, cost, num_targets, result, workspace, nullptr);
  std::free(workspace);
  return error;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int linear_assignment_float32(const groupdetr::AssignmentBatch* batch,
                                                                                const float* cost,
                                                                                const int64_t* num_targets,
                                                                                int64_t* result) {
  return solve(batch, cost, num_targets, result);
}

#if !defined(FLOAT32_ONLY)
extern "C"
    __attribute__((visibility("default"))) int linear_assignment_float64(const groupdetr::AssignmentBatch* batch,
                                                                         const double* cost, const int64_t* num_targets,
                                                                         int64_t* result) {
  return solve(batch, cost, num_targets, result);
}
#endif
