// Batched rectangular linear assignment on the GPU, by the algorithm of cpu/linear_assignment.cpp:
//   1. Each warp finds the cheapest columns of some rows.
//   2. The rows take their cheapest columns; of several rows that want the same one the first gets it.
//   3. One after the other, the rows left over find shortest augmenting paths, by Dijkstra's algorithm over the
//   "slots":
//      the matched columns in the order in which they became matched. A column that is not matched has dual 0, so of
//      all of them only the cheapest of a row can end a path.
// A block solves one problem: one warp a small problem, several warps a large one. Costs are compared as they are and
// added up as doubles. Wherever values are equal the smaller index wins, so the result does not depend on the number or
// the speed of the threads; it is that of the CPU kernel.
//
// Free of torch: pointers and sizes only.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../linear_assignment.h"
#include "warp.cuh"

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
};

namespace {

constexpr uint32_t kNone = 0xffffffff;  // larger than every index
constexpr double kInfinity = __builtin_huge_val();

// The arrays of one problem of up to `rows` x `columns`, rows <= columns. Nothing is initialised here.
template <typename T>
struct Workspace {
  double* dual;               // [rows] v <= 0 of a slot's column
  double* distance;           // [rows] length of the shortest path found to a slot
  T* row_minimum;             // [rows] the cheapest cost of a row; infinite where no cost is usable
  T* cheapest_cost;           // [rows] the cheapest cost among free columns when last looked for,
  uint32_t* cheapest_column;  // [rows] and its column
  int32_t* row_slot;          // [rows] slot that a row is matched to
  int32_t* waiting;           // [rows] rows that did not get their cheapest column
  int32_t* num_waiting;       // [1]
  uint32_t* slot_column;      // [rows]
  int32_t* slot_row;          // [rows]
  int32_t* previous;          // [rows] row before a slot on the shortest path to it
  uint32_t* taken;            // [columns / 32] bit set of the matched columns
  uint8_t* scanned;           // [rows] whether the path to a slot is final

  // Returns the number of bytes, a multiple of 16.
  HOST_DEVICE size_t place(char* memory, int32_t rows, int32_t columns) {
    size_t used = 0;
    take(memory, used, dual, rows);
    take(memory, used, distance, rows);
    take(memory, used, row_minimum, rows);
    take(memory, used, cheapest_cost, rows);
    take(memory, used, cheapest_column, rows);
    take(memory, used, row_slot, rows);
    take(memory, used, waiting, rows);
    take(memory, used, num_waiting, 1);
    take(memory, used, slot_column, rows);
    take(memory, used, slot_row, rows);
    take(memory, used, previous, rows);
    take(memory, used, taken, (static_cast<size_t>(columns) + 31) / 32);
    take(memory, used, scanned, rows);
    return (used + 15) / 16 * 16;
  }

 private:
  template <typename V>
  HOST_DEVICE void take(char* memory, size_t& used, V*& array, size_t count) {
    array = reinterpret_cast<V*>(memory + used);
    used += count * sizeof(V);
  }
};

struct Minimum {
  double value;
  uint32_t index;
};

__device__ __forceinline__ uint32_t warp_minimum(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = kWarpSize / 2; step > 0; step /= 2) value = min(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
#else
  return __reduce_min_sync(kAllLanes, value);
#endif
}

// The smallest value of the lanes; among equal ones that of the smallest index.
__device__ __forceinline__ Minimum warp_minimum(Minimum own) {
  const uint64_t bits = ordered_bits(own.value);
  const uint32_t high = static_cast<uint32_t>(bits >> 32), low = static_cast<uint32_t>(bits);
  const uint32_t least_high = warp_minimum(high);
  const uint32_t least_low = warp_minimum(high == least_high ? low : 0xffffffff);
  const uint32_t index = warp_minimum(high == least_high && low == least_low ? own.index : kNone);
  return {from_ordered_bits(static_cast<uint64_t>(least_high) << 32 | least_low), index};
}

// The threads of a block, which work on one problem.
template <int kThreads>
class Team {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSize = kThreads;

  __device__ __forceinline__ int rank() const { return threadIdx.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarpSize; }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ bool any(bool value) const {
    if constexpr (kWarps == 1) {
      return __any_sync(kAllLanes, value);
    } else {
      return __syncthreads_or(value);
    }
  }

  // The smallest value of the team; among equal ones that of the smallest index. Orders memory as sync() does.
  __device__ __forceinline__ Minimum minimum(Minimum own) {
    own = warp_minimum(own);
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      // Two buffers in turn: a warp that is ahead by one call cannot overwrite what another one still reads.
      static __shared__ double values[2][kWarps];
      static __shared__ uint32_t indices[2][kWarps];
      if (lane() == 0) {
        values[turn_][warp()] = own.value;
        indices[turn_][warp()] = own.index;
      }
      __syncthreads();
      own = {kInfinity, kNone};
      if (lane() < kWarps) own = {values[turn_][lane()], indices[turn_][lane()]};
      turn_ ^= 1;
      own = warp_minimum(own);
    }
    return own;
  }

 private:
  int turn_ = 0;
};

// One problem, 1 <= rows <= columns: the cost of row i and column j is data[i * row_step + j * column_step].
template <typename T>
struct CostMatrix {
  const T* data;
  int64_t row_step, column_step;
  int32_t rows;
  uint32_t columns;
};

template <typename T, typename Team>
class Solver {
 public:
  __device__ __forceinline__ Solver(const CostMatrix<T>& costs, const Workspace<T>& workspace, Team& team)
      : costs_(costs), w_(workspace), team_(team) {}

  __device__ __forceinline__ void solve() {
    for (uint32_t word = team_.rank(); word < (costs_.columns + 31) / 32; word += Team::kSize) w_.taken[word] = 0;
    if (team_.any(!find_row_minima())) find_sentinel();
    team_.sync();
    if (team_.warp() == 0) match_free_minima();
    team_.sync();
    const int32_t num_waiting = *w_.num_waiting;
    num_slots_ = costs_.rows - num_waiting;
    for (int32_t index = 0; index < num_waiting; ++index) augment(w_.waiting[index]);
  }

 private:
  const CostMatrix<T> costs_;
  const Workspace<T> w_;
  Team& team_;
  int32_t num_slots_ = 0;
  double sentinel_ = 0;

  __device__ __forceinline__ double usable(T cost) const { return is_usable(cost) ? cost : sentinel_; }

  __device__ __forceinline__ T raw_cost(int32_t row, uint32_t column) const {
    return __ldg(costs_.data + row * costs_.row_step + column * costs_.column_step);
  }

  // The cost of a row and a column above the smallest cost of the row.
  __device__ __forceinline__ double shifted_cost(int32_t row, uint32_t column) const {
    return usable(raw_cost(row, column)) - usable(w_.row_minimum[row]);
  }

  __device__ __forceinline__ bool is_taken(uint32_t column) const { return w_.taken[column / 32] >> column % 32 & 1; }

  // The cheapest of the columns first, first + step, ... for kRows rows at once, so that many loads are in flight.
  // Unusable costs count as infinite; the result tells whether there are none. Rows beyond the last repeat it.
  template <int kRows, bool kFreeOnly>
  __device__ __forceinline__ bool find_cheapest(int32_t first_row, uint32_t first, uint32_t step, T (&best)[kRows],
                                                uint32_t (&best_column)[kRows]) const {
    const T* next[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = min(first_row + r, costs_.rows - 1);
      next[r] = costs_.data + row * costs_.row_step + first * costs_.column_step;
      best[r] = static_cast<T>(kInfinity);
      best_column[r] = kNone;
    }
    bool all_usable = true;
#pragma unroll(kRows == 1 ? 4 : 2)
    for (uint32_t column = first; column < costs_.columns; column += step) {
      const bool skip = kFreeOnly && is_taken(column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T raw = __ldg(next[r]);
        next[r] += step * costs_.column_step;
        const bool is_cost = is_usable(raw);
        all_usable &= is_cost;
        const T cost = is_cost ? raw : static_cast<T>(kInfinity);
        if (!skip && (cost < best[r] || best_column[r] == kNone)) {
          best[r] = cost;
          best_column[r] = column;
        }
      }
    }
    return all_usable;
  }

  // False if this thread saw a cost that is not usable.
  __device__ __forceinline__ bool find_row_minima() {
    constexpr int kRows = 4;
    bool all_usable = true;
    for (int32_t first = team_.warp() * kRows; first < costs_.rows; first += Team::kWarps * kRows) {
      T best[kRows];
      uint32_t column[kRows];
      all_usable &= find_cheapest<kRows, false>(first, team_.lane(), kWarpSize, best, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Minimum cheapest = warp_minimum({best[r], column[r]});
        if (team_.lane() == 0 && first + r < costs_.rows) {
          w_.row_minimum[first + r] = w_.cheapest_cost[first + r] = static_cast<T>(cheapest.value);
          w_.cheapest_column[first + r] = cheapest.index;
        }
      }
    }
    return all_usable;
  }

  __device__ __forceinline__ void find_sentinel() {
    double smallest = kInfinity, largest = -kInfinity;
    for (int32_t row = team_.warp(); row < costs_.rows; row += Team::kWarps) {
      for (uint32_t column = team_.lane(); column < costs_.columns; column += kWarpSize) {
        const T cost = raw_cost(row, column);
        if (!is_usable(cost)) continue;
        smallest = cost < smallest ? cost : smallest;
        largest = cost > largest ? cost : largest;
      }
    }
    smallest = team_.minimum({smallest, 0}).value;
    largest = -team_.minimum({-largest, 0}).value;
    if (smallest <= largest) sentinel_ = sentinel_cost(smallest, largest, costs_.rows);
  }

  // By one warp, a row per lane.
  __device__ __forceinline__ void match_free_minima() {
    const uint32_t lanes_before = (1u << team_.lane()) - 1;
    int32_t matched = 0;
    for (int32_t first = 0; first < costs_.rows; first += kWarpSize) {
      const int32_t row = first + team_.lane();
      const bool exists = row < costs_.rows;
      const uint32_t column = exists ? w_.cheapest_column[row] : kNone;
      const uint32_t rivals = __match_any_sync(kAllLanes, column);
      const bool wins = exists && (rivals & lanes_before) == 0 && !is_taken(column);
      const uint32_t winners = __ballot_sync(kAllLanes, wins);
      __syncwarp();
      if (wins) {
        atomicOr(&w_.taken[column / 32], 1u << column % 32);
        add_slot(matched + __popc(winners & lanes_before), column, row);
      } else if (exists) {
        w_.waiting[first - matched + __popc(~winners & lanes_before)] = row;
      }
      matched += __popc(winners);
      __syncwarp();
    }
    if (team_.lane() == 0) *w_.num_waiting = costs_.rows - matched;
  }

  __device__ __forceinline__ void add_slot(int32_t slot, uint32_t column, int32_t row) const {
    w_.slot_column[slot] = column;
    w_.dual[slot] = 0;
    match(row, slot);
  }

  __device__ __forceinline__ void match(int32_t row, int32_t slot) const {
    w_.row_slot[row] = slot;
    w_.slot_row[slot] = row;
  }

  // Find the shortest path from `source` to a free column and match along it. Every turn of the loop scans one more
  // slot; among paths of equal length one that ends here is taken. All threads hold the same values except in arrays
  // over slots, where each thread has slots of its own until the path is known.
  __device__ __forceinline__ void augment(int32_t source) {
    for (int32_t slot = team_.rank(); slot < num_slots_; slot += Team::kSize) {
      w_.distance[slot] = kInfinity;
      w_.scanned[slot] = false;
    }
    int32_t row = source, last_row = source;
    uint32_t last_column = kNone;
    double offset = 0;  // path length to `row` minus the dual of `row`
    double path_length = kInfinity;
    for (int32_t turn = 0; turn <= num_slots_; ++turn) {
      const double row_minimum = usable(w_.row_minimum[row]);
      if (offset + usable(w_.cheapest_cost[row]) - row_minimum < path_length) {
        const Minimum cheapest = find_cheapest_free(row);
        const double length = offset + (usable(static_cast<T>(cheapest.value)) - row_minimum);
        if (length < path_length) {
          path_length = length;
          last_row = row;
          last_column = cheapest.index;
        }
      }
      const Minimum nearest = relax(row, offset);
      if (!(nearest.value < path_length)) break;
      const int32_t slot = nearest.index;
      if (team_.rank() == slot % Team::kSize) w_.scanned[slot] = true;
      row = w_.slot_row[slot];
      offset = nearest.value - (shifted_cost(row, w_.slot_column[slot]) - w_.dual[slot]);
    }
    for (int32_t slot = team_.rank(); slot < num_slots_; slot += Team::kSize) {
      if (w_.scanned[slot]) w_.dual[slot] += w_.distance[slot] - path_length;
    }
    if (team_.rank() == 0) {
      w_.taken[last_column / 32] |= 1u << last_column % 32;
      match_path(source, last_row, last_column);
    }
    ++num_slots_;
    team_.sync();
  }

  // The cheapest cost found before is a lower bound once its column is taken.
  __device__ __forceinline__ Minimum find_cheapest_free(int32_t row) {
    const uint32_t known = w_.cheapest_column[row];
    if (!is_taken(known)) return {w_.cheapest_cost[row], known};
    T best[1];
    uint32_t column[1];
    find_cheapest<1, true>(row, team_.rank(), Team::kSize, best, column);
    const Minimum cheapest = team_.minimum({best[0], column[0]});
    if (team_.rank() == 0) {
      w_.cheapest_cost[row] = static_cast<T>(cheapest.value);
      w_.cheapest_column[row] = cheapest.index;
    }
    return cheapest;
  }

  // Shorten the paths to all slots by way of `row`; return the nearest slot that is not scanned.
  __device__ __forceinline__ Minimum relax(int32_t row, double offset) {
    Minimum nearest = {kInfinity, kNone};
    for (int32_t slot = team_.rank(); slot < num_slots_; slot += Team::kSize) {
      if (w_.scanned[slot]) continue;
      const double length = shifted_cost(row, w_.slot_column[slot]) - w_.dual[slot] + offset;
      double distance = w_.distance[slot];
      if (length < distance) {
        w_.distance[slot] = distance = length;
        w_.previous[slot] = row;
      }
      if (distance < nearest.value) nearest = {distance, static_cast<uint32_t>(slot)};
    }
    return team_.minimum(nearest);
  }

  // Hand each slot on the path to the row before it, back to the source.
  __device__ __forceinline__ void match_path(int32_t source, int32_t last_row, uint32_t last_column) const {
    int32_t row = last_row, slot = num_slots_;
    w_.slot_column[slot] = last_column;
    w_.dual[slot] = 0;
    for (int32_t step = 0; step < num_slots_ && row != source; ++step) {
      const int32_t old_slot = w_.row_slot[row];
      match(row, slot);
      slot = old_slot;
      row = w_.previous[slot];
    }
    match(source, slot);
  }
};

template <typename T, int kThreads, bool kSharedWorkspace>
__global__ void __launch_bounds__(kThreads, 1)
    solve_assignments(AssignmentBatch batch, const T* __restrict__ cost, const int64_t* __restrict__ num_targets,
                      int64_t* __restrict__ result, char* __restrict__ global_workspace, size_t workspace_bytes) {
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
  Workspace<T> workspace;
  workspace.place(
      kSharedWorkspace ? reinterpret_cast<char*>(dynamic_shared_memory) : global_workspace + problem * workspace_bytes,
      min(batch.targets, batch.queries), max(batch.targets, batch.queries));
  Team<kThreads> team;
  const int32_t rows = min(targets, batch.queries);
  if (rows > 0) {
    const CostMatrix<T> costs = {cost, transpose ? 1 : batch.target_stride, transpose ? batch.target_stride : 1, rows,
                                 static_cast<uint32_t>(max(targets, batch.queries))};
    Solver<T, Team<kThreads>>(costs, workspace, team).solve();
  }
  for (int32_t target = team.rank(); target < batch.targets; target += kThreads) {
    const bool matched = !transpose && target < rows;
    result[target] = matched ? workspace.slot_column[workspace.row_slot[target]] : int64_t{-1};
  }
  if (transpose) {
    team.sync();
    for (int32_t row = team.rank(); row < rows; row += kThreads) {
      result[workspace.slot_column[workspace.row_slot[row]]] = row;
    }
  }
}

}  // namespace

// How one block solves a problem of a batch.
struct AssignmentPlan {
  int32_t threads;
  size_t workspace_bytes;  // per problem
  bool in_shared_memory;   // otherwise the launch needs problems * workspace_bytes of global memory
};

template <typename T>
AssignmentPlan plan_assignment(const AssignmentBatch& batch) {
  constexpr size_t kSharedBytes = 46 << 10;  // of the 48 KiB that every GPU gives without asking
  const int32_t rows = batch.targets < batch.queries ? batch.targets : batch.queries;
  const int32_t columns = batch.targets < batch.queries ? batch.queries : batch.targets;
  const size_t bytes = Workspace<T>().place(nullptr, rows, columns);
  if (rows <= 32 && columns <= 1024) return {32, bytes, true};
  if (rows <= 512 && columns <= 1024) return {128, bytes, true};
  return {512, bytes, bytes <= kSharedBytes};
}

template <typename T>
cudaError_t launch_assignment(const AssignmentPlan& plan, const AssignmentBatch& batch, const T* cost,
                              const int64_t* num_targets, int64_t* result, void* workspace, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(batch.problems);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.in_shared_memory ? plan.workspace_bytes : 0;
  config.stream = stream;
  const auto kernel = plan.threads == 32      ? &solve_assignments<T, 32, true>
                      : plan.threads == 128   ? &solve_assignments<T, 128, true>
                      : plan.in_shared_memory ? &solve_assignments<T, 512, true>
                                              : &solve_assignments<T, 512, false>;
  return cudaLaunchKernelEx(&config, kernel, batch, cost, num_targets, result, static_cast<char*>(workspace),
                            plan.workspace_bytes);
}

}  // namespace groupdetr
