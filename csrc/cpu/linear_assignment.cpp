// Batched rectangular linear assignment on the CPU.
//
// Shortest augmenting paths (Crouse 2016) with two savings for problems with many more columns than rows:
//   1. A column that is not matched has dual 0, so of all of them only the cheapest can end a path from a row. One
//      vectorised pass per row finds it; most rows then take it at once.
//   2. The other rows search over matched columns alone, of which there are at most as many as rows. These get "slots"
//      in the order in which they become matched; a row's costs at the slots are gathered when it is first scanned.
// Costs are compared as they are; everything that is added up is double, so a float32 problem is solved exactly.

#include "../linear_assignment.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common.h"
#include "../linear_assignment_arguments.h"
#include "simd.h"

namespace groupdetr {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kAlignment = 64;

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
  double* slot_costs;        // [rows, slot_capacity] cost - row_shift
  double* dual;              // [slot_capacity] v <= 0 of a slot's column; -inf while scanned and beyond the last slot
  double* distance;          // [slot_capacity] length of the shortest path found; +inf while scanned
  int64_t* previous;         // [slot_capacity] row before a slot on that path
  int32_t* slot_column;      // [slot_capacity]
  int32_t* slot_row;         // [slot_capacity]
  int32_t* scanned_slot;     // [slot_capacity] the scanned slots in order,
  double* scanned_distance;  // [slot_capacity] with their distances
  double* scanned_dual;      // [slot_capacity] and their duals before the search
  void* blocked;             // [columns] in the cost's type: +inf where a column is matched, else 0

  Workspace(int64_t rows, int64_t columns) : slot_capacity(round_up(std::max<int64_t>(rows, 1), 8)) {
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
      take(next, slot_costs, rows * slot_capacity);
      take(next, dual, slot_capacity);
      take(next, distance, slot_capacity);
      take(next, previous, slot_capacity);
      take(next, slot_column, slot_capacity);
      take(next, slot_row, slot_capacity);
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

// --- Vectors of kBytes ---

template <typename T, int kBytes>
struct Lanes {
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Values __attribute__((vector_size(kBytes)));
  typedef Int Ints __attribute__((vector_size(kBytes)));
};

template <typename T>
struct Minimum {
  T value;
  int64_t index;
};

// Smallest value over the lanes; among equal ones that of the smallest index.
template <typename T, int kBytes>
ALWAYS_INLINE Minimum<T> minimum_over_lanes(const typename Lanes<T, kBytes>::Values& values,
                                            const typename Lanes<T, kBytes>::Ints& indices) {
  using Half = Lanes<T, kBytes / 2>;
  typename Half::Values low, high;
  typename Half::Ints low_index, high_index;
  load(low, reinterpret_cast<const char*>(&values));
  load(high, reinterpret_cast<const char*>(&values) + kBytes / 2);
  load(low_index, reinterpret_cast<const char*>(&indices));
  load(high_index, reinterpret_cast<const char*>(&indices) + kBytes / 2);
  const auto take_high = (high < low) | ((high == low) & (high_index < low_index));
  const typename Half::Values value = take_high ? high : low;
  const typename Half::Ints index = take_high ? high_index : low_index;
  if constexpr (Half::kLanes == 1) {
    return {value[0], index[0]};
  } else {
    return minimum_over_lanes<T, kBytes / 2>(value, index);
  }
}

// Smallest entry of `row` and its first position. With kMasked, `blocked` is added to the row; without, `magnitudes`
// collects the largest bit pattern of an absolute value, which tells unusable costs: NaN and infinities come last.
template <typename T, int kBytes, bool kMasked>
ALWAYS_INLINE Minimum<T> row_minimum(const T* row, const T* blocked, int64_t size,
                                     typename Lanes<T, kBytes>::Ints& magnitudes) {
  using V = Lanes<T, kBytes>;
  using Values = typename V::Values;
  using Ints = typename V::Ints;
  constexpr int kLanes = V::kLanes;
  constexpr auto kNoSign = std::numeric_limits<typename V::Int>::max();

  T padded_row[kLanes], padded_blocked[kLanes];
  if (size < kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      padded_row[lane] = row[lane < size ? lane : 0];
      if constexpr (kMasked) padded_blocked[lane] = blocked[lane < size ? lane : 0];
    }
    row = padded_row;
    if constexpr (kMasked) blocked = padded_blocked;
    size = kLanes;
  }

  // Two chains, because each step of one waits for the step before.
  Values best[2];
  Ints best_index[2], biggest[2];
  Ints lane_index;
  for (int lane = 0; lane < kLanes; ++lane) lane_index[lane] = lane;
  const auto step = [&](int chain, int64_t at) __attribute__((always_inline)) {
    Values values;
    load(values, row + at);
    if constexpr (kMasked) {
      Values block;
      load(block, blocked + at);
      values += block;
    } else {
      Ints bits;
      load(bits, row + at);
      bits &= kNoSign;
      biggest[chain] = bits > biggest[chain] ? bits : biggest[chain];
    }
    const auto better = values < best[chain];
    const Ints index = lane_index + static_cast<typename V::Int>(at);
    best[chain] = better ? values : best[chain];
    best_index[chain] = better ? index : best_index[chain];
  };
  for (int chain = 0; chain < 2; ++chain) {
    best[chain] = Values{} + std::numeric_limits<T>::infinity();
    best_index[chain] = lane_index;
    biggest[chain] = magnitudes;
  }
  int64_t at = 0;
  for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
    step(0, at);
    step(1, at + kLanes);
  }
  if (at + kLanes <= size) step(0, at);
  step(1, size - kLanes);  // The tail may see some entries twice, which changes no minimum.

  if constexpr (!kMasked) magnitudes = biggest[0] > biggest[1] ? biggest[0] : biggest[1];
  const auto take_second = (best[1] < best[0]) | ((best[1] == best[0]) & (best_index[1] < best_index[0]));
  const Values both = take_second ? best[1] : best[0];
  const Ints both_index = take_second ? best_index[1] : best_index[0];
  return minimum_over_lanes<T, kBytes>(both, both_index);
}

// --- The search ---

template <typename T, int kBytes>
class Solver {
 public:
  ALWAYS_INLINE Solver(const T* costs, int64_t row_stride, int64_t rows, int64_t columns, Workspace& workspace)
      : costs_(costs),
        row_stride_(row_stride),
        rows_(rows),
        columns_(columns),
        w_(workspace),
        blocked_(static_cast<T*>(workspace.blocked)) {}

  ALWAYS_INLINE bool solve() {
    if (!find_row_minima()) return false;
    match_free_minima();
    for (int64_t index = 0; index < num_waiting_; ++index) augment(w_.waiting[index]);
    return true;
  }

 private:
  const T* costs_;
  int64_t row_stride_;
  int64_t rows_;
  int64_t columns_;
  Workspace& w_;
  T* blocked_;
  int64_t num_slots_ = 0;
  int64_t num_waiting_ = 0;

  ALWAYS_INLINE bool find_row_minima() {
    typename Lanes<T, kBytes>::Ints magnitudes = {};
    for (int64_t row = 0; row < rows_; ++row) {
      const auto cheapest = row_minimum<T, kBytes, false>(costs_ + row * row_stride_, nullptr, columns_, magnitudes);
      w_.cheapest_column[row] = static_cast<int32_t>(cheapest.index);
      w_.cheapest_cost[row] = cheapest.value;
    }
    constexpr T kLargest = CostLimit<T>::kLargest;
    typename Lanes<T, kBytes>::Int limit;
    __builtin_memcpy(&limit, &kLargest, sizeof(T));
    bool usable = true;
    for (int lane = 0; lane < Lanes<T, kBytes>::kLanes; ++lane) usable &= magnitudes[lane] <= limit;
    return usable;
  }

  ALWAYS_INLINE void match_free_minima() {
    std::memset(blocked_, 0, columns_ * sizeof(T));
    for (int64_t slot = 0; slot < w_.slot_capacity; ++slot) w_.dual[slot] = -kInfinity;
    for (int64_t row = 0; row < rows_; ++row) {
      w_.row_shift[row] = w_.cheapest_cost[row];
      w_.gathered[row] = 0;
      if (blocked_[w_.cheapest_column[row]] == 0) {
        match(row, add_slot(w_.cheapest_column[row]));
      } else {
        w_.waiting[num_waiting_++] = static_cast<int32_t>(row);
      }
    }
  }

  ALWAYS_INLINE int64_t add_slot(int32_t column) {
    w_.slot_column[num_slots_] = column;
    w_.dual[num_slots_] = 0;
    blocked_[column] = std::numeric_limits<T>::infinity();
    return num_slots_++;
  }

  ALWAYS_INLINE void match(int64_t row, int64_t slot) {
    w_.row_slot[row] = static_cast<int32_t>(slot);
    w_.slot_row[slot] = static_cast<int32_t>(row);
  }

  // Find the shortest path from `source` to a free column, by Dijkstra over the slots, and match along it. Every turn
  // of the loop scans one more slot, so it ends; among paths of equal length one that ends here is taken.
  ALWAYS_INLINE void augment(int64_t source) {
    for (int64_t slot = 0; slot < w_.slot_capacity; ++slot) w_.distance[slot] = kInfinity;
    int64_t num_scanned = 0;
    int64_t row = source;
    double offset = 0;  // path length to `row` minus the dual of `row`
    double path_length = kInfinity;
    int64_t last_row = source;
    while (true) {
      if (offset + w_.cheapest_cost[row] - w_.row_shift[row] < path_length) {
        refresh_cheapest(row);
        const double length = offset + (w_.cheapest_cost[row] - w_.row_shift[row]);
        if (length < path_length) {
          path_length = length;
          last_row = row;
        }
      }
      gather(row);
      const Minimum<double> nearest = relax(row, offset);
      if (!(nearest.value < path_length) || num_scanned == num_slots_) break;
      const int64_t slot = nearest.index;
      w_.scanned_slot[num_scanned] = static_cast<int32_t>(slot);
      w_.scanned_distance[num_scanned] = nearest.value;
      w_.scanned_dual[num_scanned] = w_.dual[slot];
      ++num_scanned;
      row = w_.slot_row[slot];
      gather(row);
      offset = nearest.value - (row_costs(row)[slot] - w_.dual[slot]);
      w_.dual[slot] = -kInfinity;  // makes every further path to this slot infinitely long
      w_.distance[slot] = kInfinity;
    }
    for (int64_t index = 0; index < num_scanned; ++index) {
      w_.dual[w_.scanned_slot[index]] = w_.scanned_dual[index] + (w_.scanned_distance[index] - path_length);
    }
    int64_t slot = add_slot(w_.cheapest_column[last_row]);
    row = last_row;
    while (row != source) {
      const int64_t old_slot = w_.row_slot[row];
      match(row, slot);
      slot = old_slot;
      row = w_.previous[slot];
    }
    match(source, slot);
  }

  ALWAYS_INLINE void refresh_cheapest(int64_t row) {
    if (blocked_[w_.cheapest_column[row]] == 0) return;
    typename Lanes<T, kBytes>::Ints unused = {};
    const auto cheapest = row_minimum<T, kBytes, true>(costs_ + row * row_stride_, blocked_, columns_, unused);
    w_.cheapest_column[row] = static_cast<int32_t>(cheapest.index);
    w_.cheapest_cost[row] = cheapest.value;
  }

  ALWAYS_INLINE double* row_costs(int64_t row) { return w_.slot_costs + row * w_.slot_capacity; }

  ALWAYS_INLINE void gather(int64_t row) {
    const T* from = costs_ + row * row_stride_;
    double* to = row_costs(row);
    const double shift = w_.row_shift[row];
    for (int64_t slot = w_.gathered[row]; slot < num_slots_; ++slot) to[slot] = from[w_.slot_column[slot]] - shift;
    w_.gathered[row] = static_cast<int32_t>(num_slots_);
  }

  // Shorten the paths to all slots by way of `row`; return the nearest slot that is not scanned.
  ALWAYS_INLINE Minimum<double> relax(int64_t row, double offset) {
    using V = Lanes<double, kBytes>;
    using Values = typename V::Values;
    using Ints = typename V::Ints;
    const double* costs = row_costs(row);
    Values best = Values{} + kInfinity;
    Ints best_index = {};
    Ints index;
    for (int lane = 0; lane < V::kLanes; ++lane) index[lane] = lane;
    // Entries beyond the last slot have dual -inf: whatever their cost, they are never nearer than +inf.
    for (int64_t slot = 0; slot < num_slots_; slot += V::kLanes) {
      Values length, dual, distance;
      Ints previous;
      load(length, costs + slot);
      load(dual, w_.dual + slot);
      load(distance, w_.distance + slot);
      load(previous, w_.previous + slot);
      length = length - dual + offset;
      const auto shorter = length < distance;
      distance = shorter ? length : distance;
      previous = shorter ? Ints{} + row : previous;
      store(w_.distance + slot, distance);
      store(w_.previous + slot, previous);
      const auto better = distance < best;
      best = better ? distance : best;
      best_index = better ? index : best_index;
      index += V::kLanes;
    }
    return minimum_over_lanes<double, kBytes>(best, best_index);
  }
};

// Requires 1 <= rows <= columns. False, and nothing solved, if a cost is not usable.
template <typename T>
bool solve(const T* costs, int64_t row_stride, int64_t rows, int64_t columns, Workspace& workspace) {
  bool solved = false;
  with_simd([&]<int kBytes>() __attribute__((always_inline)) {
    // Vectors of 64 bytes were measured to be slower: gcc 12 moves every comparison from and to mask registers.
    solved = Solver<T, (kBytes > 32 ? 32 : kBytes)>(costs, row_stride, rows, columns, workspace).solve();
  });
  return solved;
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
