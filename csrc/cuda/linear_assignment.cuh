// Batched rectangular linear assignment on the GPU, by the algorithm of cpu/linear_assignment.cpp:
//   1. Each warp finds the cheapest columns of some rows.
//   2. The rows take their cheapest columns; of several rows that want the same one the first gets it.
//   3. One after the other, the rows left over find shortest augmenting paths, by Dijkstra's algorithm over the
//   "slots":
//      the matched columns in the order in which they became matched. A column that is not matched has dual 0, so of
//      all of them only the cheapest of a row can end a path.
// A block solves one problem: one warp a small problem, several warps a large one. Costs are compared as they are and
// added up as doubles, or as integers where that is the same and doubles are slow. Wherever values are equal the
// smaller index wins, so the result does not depend on the number or the speed of the threads; it is that of the CPU
// kernel.
//
// Free of torch: pointers and sizes only. Here are the kernel, which way is taken and the launch; the search is in
// linear_assignment_solver.cuh.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "linear_assignment_solver.cuh"

extern __shared__ double dynamic_shared_memory[];

namespace groupdetr {

constexpr int kMaxLeadingDims = 8;

// Costs [..., targets, queries] with contiguous queries, and one number of targets per problem.
struct AssignmentBatch {
  int32_t problems, targets, queries;
  int32_t leading_dims;
  int64_t target_stride;
  int32_t leading_sizes[kMaxLeadingDims];
  int64_t cost_strides[kMaxLeadingDims];
  int64_t num_targets_strides[kMaxLeadingDims];

  int32_t rows() const { return std::min(targets, queries); }
  int32_t columns() const { return std::max(targets, queries); }
};

namespace {

// So many blocks of 128 threads that search shared costs fit a multiprocessor by their registers.
template <typename T>
constexpr int kBlocksWithSharedCosts = sizeof(T) == sizeof(float) ? 8 : 6;

// How many blocks fit at least, by their registers. Searches wait most of the time, and batches of a thousand problems
// are common: what does not run at the same time runs one after the other.
template <typename T, int kThreads, bool kSharedCosts, bool kSharedWorkspace>
constexpr int blocks_at_least() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int kBlocksOf128 = 8;  // of 1024 threads
#else
  constexpr int kBlocksOf128 = 9;
#endif
  if (kSharedCosts) return kBlocksWithSharedCosts<T>;
  return kThreads == 128 ? kBlocksOf128 : kThreads == 512 && kSharedWorkspace ? 2 : 1;
}

// kThreads prepare, and the first kSearchThreads of them search. kFixedPoint: in integers, problem by problem, where
// that is exact. kSharedCosts: what is searched is a copy of the costs in shared memory, behind the workspace.
template <typename T, int kThreads, int kSearchThreads, bool kFixedPoint, bool kSharedCosts, bool kSharedWorkspace>
__global__ void __launch_bounds__(kThreads, blocks_at_least<T, kThreads, kSharedCosts, kSharedWorkspace>())
    solve_assignments(AssignmentBatch batch, const T* __restrict__ cost, const int64_t* __restrict__ num_targets,
                      int64_t* __restrict__ result, char* __restrict__ global_workspace, size_t workspace_bytes) {
  static_assert(kSharedWorkspace || !kSharedCosts);
  using SearchTeam = Team<kSearchThreads>;
  const int32_t problem = blockIdx.x;
  int32_t rest = problem;
  for (int32_t dim = batch.leading_dims - 1; dim >= 0; --dim) {
    const int32_t index = rest % batch.leading_sizes[dim];
    cost += index * batch.cost_strides[dim];
    num_targets += index * batch.num_targets_strides[dim];
    rest /= batch.leading_sizes[dim];
  }
  result += static_cast<int64_t>(problem) * batch.targets;

  const int64_t wanted = __ldg(num_targets);
  const int32_t targets = wanted < 0 ? 0 : wanted < batch.targets ? static_cast<int32_t>(wanted) : batch.targets;
  const bool transpose = batch.queries < targets;
  char* const memory =
      kSharedWorkspace ? reinterpret_cast<char*>(dynamic_shared_memory) : global_workspace + problem * workspace_bytes;
  const int32_t most_rows = min(batch.targets, batch.queries), most_columns = max(batch.targets, batch.queries);
  Workspace<double> workspace;
  const size_t used = workspace.place(memory, most_rows, most_columns);
  SearchTeam team;
  const int32_t rows = min(targets, batch.queries);
  if (rows > 0) {
    const GlobalCosts<T> costs = {cost, transpose ? 1 : batch.target_stride, transpose ? batch.target_stride : 1, rows,
                                  static_cast<uint32_t>(max(targets, batch.queries))};
    T* const copy = reinterpret_cast<T*>(memory + used);
    Team<kThreads> all;
    Preparation<T, Team<kThreads>, kFixedPoint, kSharedCosts> preparation(costs, workspace, copy, all);
    preparation.run();
    if constexpr (kSearchThreads < kThreads) {
      if (all.rank() >= kSearchThreads) return;
    }
    const auto search_in = [&](const auto& costs_of_search) {
      using Costs = std::decay_t<decltype(costs_of_search)>;
      if constexpr (kFixedPoint) {
        if (preparation.is_exact()) {
          Workspace<int64_t> of_integers;
          of_integers.place(memory, most_rows, most_columns);
          Search<T, SearchTeam, Costs, InFixedPoint>(costs_of_search, preparation.in_fixed_point(), of_integers, team)
              .solve();
          return;
        }
      }
      Search<T, SearchTeam, Costs, InDoubles>(costs_of_search, preparation.in_doubles(), workspace, team).solve();
    };
    if constexpr (kSharedCosts) {
      search_in(SharedCosts<T>{copy, costs.rows, costs.columns});
    } else {
      search_in(costs);
    }
  } else if constexpr (kSearchThreads < kThreads) {
    if (threadIdx.x >= kSearchThreads) return;
  }
  for (int32_t target = team.rank(); target < batch.targets; target += kSearchThreads) {
    const bool matched = !transpose && target < rows;
    result[target] = matched ? workspace.slot_column[workspace.row_slot[target]] : int64_t{-1};
  }
  if (transpose) {
    team.sync();
    for (int32_t row = team.rank(); row < rows; row += kSearchThreads) {
      result[workspace.slot_column[workspace.row_slot[row]]] = row;
    }
  }
}

}  // namespace

// What the way to solve a batch depends on besides its sizes.
struct AssignmentDevice {
  int32_t multiprocessors;
  int32_t threads_of_multiprocessor;
  size_t shared_of_multiprocessor;  // bytes of shared memory
  size_t shared_of_block;           // the same, of a block that asks for as much as it can get
  bool slow_doubles;                // whether doubles are added up much slower than integers
};

// How one block solves a problem of a batch.
struct AssignmentPlan {
  int32_t threads, search_threads;
  size_t workspace_bytes;  // per problem
  bool in_shared_memory;   // otherwise the launch needs problems * workspace_bytes of global memory
  bool fixed_point;        // where a problem allows it
  bool shared_costs;
  size_t dynamic_bytes;  // of shared memory, per block
};

constexpr size_t kStaticBytes = 256;  // of shared memory, that a block which searches shared costs has at most

// With `shared_costs`, blocks copy their costs to shared memory if then all problems still run at the same time. Such
// blocks have four warps, of which one goes on alone where a turn of the search has few slots for each lane: the
// barriers of a turn cost more than three times as many slots.
template <typename T>
AssignmentPlan plan_assignment(const AssignmentBatch& batch, const AssignmentDevice& device, bool shared_costs) {
  constexpr size_t kSharedBytes = 46 << 10;  // of the 48 KiB that every GPU gives without asking
  const int32_t rows = batch.rows(), columns = batch.columns();
  const size_t bytes = Workspace<double>().place(nullptr, rows, columns);
  const bool fixed_point = device.slow_doubles && sizeof(T) == sizeof(float);
  if (shared_costs) {
    constexpr int32_t kThreads = 128, kRowsOfWarp = 128;
    constexpr size_t kSystemBytes = 1 << 10;  // per block, of a multiprocessor
    const size_t with_costs = bytes + static_cast<size_t>(rows) * columns * sizeof(T);
    const size_t of_block = with_costs + kStaticBytes + kSystemBytes;
    const size_t blocks = std::min({device.shared_of_multiprocessor / of_block,
                                    static_cast<size_t>(device.threads_of_multiprocessor / kThreads),
                                    static_cast<size_t>(kBlocksWithSharedCosts<T>)});
    if (with_costs + kStaticBytes <= device.shared_of_block && batch.problems <= device.multiprocessors * blocks) {
      return {kThreads, rows <= kRowsOfWarp ? 32 : kThreads, bytes, true, fixed_point, true, with_costs};
    }
  }
  if (rows <= 32 && columns <= 1024) return {32, 32, bytes, true, fixed_point, false, bytes};
  if (rows <= 512 && columns <= 1024) return {128, 128, bytes, true, fixed_point, false, bytes};
  const bool fits = bytes <= kSharedBytes;
  return {512, 512, bytes, fits, fixed_point, false, fits ? bytes : 0};
}

template <typename T, bool kFixedPoint>
auto kernel_of(const AssignmentPlan& plan) {
  if (plan.shared_costs && plan.search_threads == 32) return &solve_assignments<T, 128, 32, kFixedPoint, true, true>;
  if (plan.shared_costs) return &solve_assignments<T, 128, 128, kFixedPoint, true, true>;
  if (plan.threads == 32) return &solve_assignments<T, 32, 32, kFixedPoint, false, true>;
  if (plan.threads == 128) return &solve_assignments<T, 128, 128, kFixedPoint, false, true>;
  if (plan.in_shared_memory) return &solve_assignments<T, 512, 512, kFixedPoint, false, true>;
  return &solve_assignments<T, 512, 512, kFixedPoint, false, false>;
}

template <typename T>
auto kernel_of(const AssignmentPlan& plan) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (plan.fixed_point) return kernel_of<T, true>(plan);
  }
  return kernel_of<T, false>(plan);
}

// Lets the kernels that search shared costs have as much shared memory as any plan for the device, which is the current
// one: to be asked once, as the limit of one plan would be too low for what another thread launches. It is no work for
// the device, so that it may be done while a CUDA graph is captured.
template <typename T>
cudaError_t allow_shared_costs(const AssignmentDevice& device) {
  AssignmentPlan plan = {};
  plan.shared_costs = true;
  for (const int32_t search_threads : {32, 128}) {
    for (const bool fixed_point : {false, true}) {
      plan.search_threads = search_threads;
      plan.fixed_point = fixed_point;
      const cudaError_t error = cudaFuncSetAttribute(kernel_of<T>(plan), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(device.shared_of_block - kStaticBytes));
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_assignment(const AssignmentPlan& plan, const AssignmentBatch& batch, const T* cost,
                              const int64_t* num_targets, int64_t* result, void* workspace, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(batch.problems);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.dynamic_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel_of<T>(plan), batch, cost, num_targets, result,
                            static_cast<char*>(workspace), plan.workspace_bytes);
}

}  // namespace groupdetr
