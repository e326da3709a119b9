// Batched rectangular linear assignment on the CPU.
//
// Shortest augmenting paths (Crouse 2016) with two savings for problems with many more columns than rows:
//   1. A column that is not matched has dual 0, so of all of them only the cheapest can end a path from a row. One
//      vectorised pass per row finds it; most rows then take it at once.
//   2. The other rows search over matched columns alone, of which there are at most as many as rows. These get "slots"
//      in the order in which they become matched; a row's costs at the slots are gathered when it is first scanned.
// Costs are compared as they are; everything that is added up is double, so a float32 problem is solved exactly.
// The search is in linear_assignment_solver.h, which is compiled once for each width of vectors.

#include "../linear_assignment.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common.h"
#include "../linear_assignment_arguments.h"
#include "simd.h"

namespace groupdetr {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kAlignment = 64;
constexpr int64_t kSlotsAtATime = 16;  // two of the widest vectors of doubles

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The arrays of the search, for problems of up to `rows` x `columns`. Nothing is initialised here.
struct Workspace {
  int64_t slot_capacity;     // entries of an array over slots, and the row length of slot_costs
  int32_t* cheapest_column;  // [rows] cheapest free column of a row when last looked for,
  double* cheapest_cost;     // [rows] and its cost: a lower bound once the column is taken
  double* row_shift;         // [rows] the smallest cost of a row, subtracted from slot_costs
  int32_t* row_slot;         // [rows] slot that a row is matched to
  int32_t* gathered;         // [rows] number of valid entries of a row in slot_costs
  int32_t* waiting;          // [rows] rows that did not get their cheapest column
  void* slot_costs;          // [rows, slot_capacity] in the cost's type
  double* dual;              // [slot_capacity] v <= 0 of a slot's column; -inf while scanned and beyond the last slot
  double* distance;          // [slot_capacity] length of the shortest path found; +inf while scanned
  int32_t* slot_column;      // [slot_capacity]
  int32_t* slot_row;         // [slot_capacity]
  int32_t* scanned_row;      // [slot_capacity + 1] the rows of a search in order,
  double* scanned_offset;    // [slot_capacity + 1] with the lengths of their paths minus their duals
  int32_t* scanned_slot;     // [slot_capacity] the slots that follow these rows,
  double* scanned_distance;  // [slot_capacity] with the lengths of their paths
  double* scanned_dual;      // [slot_capacity] and their duals before the search
  void* blocked;             // [columns] in the cost's type: +inf where a column is matched, else 0

  Workspace(int64_t rows, int64_t columns) : slot_capacity(round_up(std::max<int64_t>(rows, 1), kSlotsAtATime)) {
    // The first pass measures, the second one hands out.
    for (std::byte* next : {static_cast<std::byte*>(nullptr), static_cast<std::byte*>(nullptr)}) {
      if (size_ > 0) {
        memory_ = std::make_unique_for_overwrite<std::byte[]>(size_ + kAlignment);
        next = memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment);
      }
      size_ = 0;
      take(next, cheapest_column, rows);
      take(next, cheapest_cost, rows);
      take(next, row_shift, rows);
      take(next, row_slot, rows);
      take(next, gathered, rows);
      take(next, waiting, rows);
      double* slot_costs_memory = nullptr;
      take(next, slot_costs_memory, rows * slot_capacity);
      slot_costs = slot_costs_memory;
      take(next, dual, slot_capacity);
      take(next, distance, slot_capacity);
      take(next, slot_column, slot_capacity);
      take(next, slot_row, slot_capacity);
      take(next, scanned_row, slot_capacity + 1);
      take(next, scanned_offset, slot_capacity + 1);
      take(next, scanned_slot, slot_capacity);
      take(next, scanned_distance, slot_capacity);
      take(next, scanned_dual, slot_capacity);
      double* blocked_memory = nullptr;
      take(next, blocked_memory, columns + 1);
      blocked = blocked_memory;
    }
  }

 private:
  template <typename T>
  void take(std::byte* base, T*& array, int64_t count) {
    array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + size_);
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
  }

  int64_t size_ = 0;
  std::unique_ptr<std::byte[]> memory_;
};

template <typename T>
struct Minimum {
  T value;
  int64_t index;
};

}  // namespace
}  // namespace groupdetr

// Code for one width of vectors must be compiled for processors that have them from its first line on: gcc splits
// vectors of what is inlined into such code later, and moves their comparisons from and to mask registers.
#define SOLVER_BYTES 16
#define SOLVER_NAMESPACE baseline
#include "linear_assignment_solver.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_WIDE_SOLVERS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define SOLVER_BYTES 32
#define SOLVER_NAMESPACE avx2
#include "linear_assignment_solver.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#define SOLVER_BYTES 64
#define SOLVER_NAMESPACE avx512
#include "linear_assignment_solver.h"
#pragma GCC pop_options
#endif

namespace groupdetr {
namespace {

// Requires 1 <= rows <= columns. False, and nothing solved, if a cost is not usable.
template <typename T>
bool solve(const T* costs, int64_t row_stride, int64_t rows, int64_t columns, Workspace& workspace) {
#if defined(HAS_WIDE_SOLVERS)
  if (simd_bytes() == 64) return avx512::Solver<T>(costs, row_stride, rows, columns, workspace).solve();
  if (simd_bytes() == 32) return avx2::Solver<T>(costs, row_stride, rows, columns, workspace).solve();
#endif
  return baseline::Solver<T>(costs, row_stride, rows, columns, workspace).solve();
}

// --- One problem ---

// The costs as doubles, with the sentinel for unusable ones, and transposed where there are fewer columns than rows.
template <typename T>
std::vector<double> usable_costs(const T* costs, int64_t row_stride, int64_t rows, int64_t columns) {
  double smallest = kInfinity, largest = -kInfinity;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const T cost = costs[row * row_stride + column];
      if (!is_usable(cost)) continue;
      smallest = std::min<double>(smallest, cost);
      largest = std::max<double>(largest, cost);
    }
  }
  const bool transpose = columns < rows;
  const double sentinel = smallest <= largest ? sentinel_cost(smallest, largest, std::min(rows, columns)) : 0;
  std::vector<double> usable(rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const T cost = costs[row * row_stride + column];
      usable[transpose ? column * rows + row : row * columns + column] = is_usable(cost) ? cost : sentinel;
    }
  }
  return usable;
}

template <typename T>
void assign(const T* costs, int64_t row_stride, int64_t rows, int64_t columns, Workspace& workspace, int64_t* result) {
  const Workspace& w = workspace;
  if (rows == 0 || columns == 0) return;
  if (columns >= rows && solve(costs, row_stride, rows, columns, workspace)) {
    for (int64_t row = 0; row < rows; ++row) result[row] = w.slot_column[w.row_slot[row]];
    return;
  }
  const std::vector<double> usable = usable_costs(costs, row_stride, rows, columns);
  if (columns >= rows) {
    solve(usable.data(), columns, rows, columns, workspace);
    for (int64_t row = 0; row < rows; ++row) result[row] = w.slot_column[w.row_slot[row]];
  } else {
    solve(usable.data(), rows, columns, rows, workspace);
    for (int64_t column = 0; column < columns; ++column) result[w.slot_column[w.row_slot[column]]] = column;
  }
}

// --- The batch ---

struct Batch {
  torch::stable::Tensor cost;         // [..., T, N]
  torch::stable::Tensor num_targets;  // [...]
  torch::stable::Tensor result;       // [..., T], contiguous
  int64_t problems, rows, columns;
};

template <typename T>
void solve_batch(const Batch& batch) {
  const T* cost = batch.cost.const_data_ptr<T>();
  const int64_t* num_targets = batch.num_targets.const_data_ptr<int64_t>();
  int64_t* result = batch.result.mutable_data_ptr<int64_t>();
  const int64_t leading = batch.num_targets.dim();
  const int64_t* sizes = batch.cost.sizes().data();
  const int64_t* cost_strides = batch.cost.strides().data();
  const int64_t* num_targets_strides = batch.num_targets.strides().data();

  // Problems differ in difficulty, so each thread takes the next one when it is done.
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    Workspace workspace(std::min(batch.rows, batch.columns), std::max(batch.rows, batch.columns));
    for (int64_t problem = next++; problem < batch.problems; problem = next++) {
      const int64_t wanted = num_targets[leading_offset(problem, leading, sizes, num_targets_strides)];
      const int64_t rows = std::clamp<int64_t>(wanted, 0, batch.rows);
      int64_t* assigned = result + problem * batch.rows;
      std::fill(assigned, assigned + batch.rows, -1);
      assign(cost + leading_offset(problem, leading, sizes, cost_strides), cost_strides[leading], rows, batch.columns,
             workspace, assigned);
    }
  };
  constexpr int64_t kCostsPerThread = 1 << 15;
  const int64_t costs = batch.problems * batch.rows * batch.columns;
  const int64_t useful = std::min(batch.problems, costs / kCostsPerThread + 1);
  const int64_t threads = std::min<int64_t>(useful, torch::stable::get_num_threads());
  if (threads <= 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

torch::stable::Tensor linear_assignment(const torch::stable::Tensor& cost, const torch::stable::Tensor& num_targets) {
  using torch::headeronly::ScalarType;
  const AssignmentSizes sizes = check_assignment(cost, num_targets);
  const bool rows_contiguous = sizes.queries <= 1 || cost.stride(sizes.leading_dims + 1) == 1;
  const Batch batch{rows_contiguous ? cost : torch::stable::contiguous(cost),
                    num_targets,
                    torch::stable::new_empty(cost, sizes.result, ScalarType::Long),
                    sizes.problems,
                    sizes.targets,
                    sizes.queries};
  if (sizes.problems > 0 && sizes.targets > 0) {
    cost.scalar_type() == ScalarType::Float ? solve_batch<float>(batch) : solve_batch<double>(batch);
  }
  return batch.result;
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&groupdetr::linear_assignment));
}
