// How one team of threads solves one assignment problem: Preparation, then Search.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear_assignment_team.cuh"

namespace groupdetr {
namespace {

// The arrays of one problem of up to `rows` x `columns`, rows <= columns. Nothing is initialised here. Their places are
// the same for both types that lengths can have, double and int64_t.
template <typename Sum>
struct Workspace {
  static_assert(sizeof(Sum) == 8);
  Sum* dual;       // [rows] v <= 0 of a slot's column
  Sum* distance;   // [rows] length of the shortest path found to a slot
  Sum* row_dual;   // [rows] u >= 0 of a slot's row, unless the slot is `scanned`
  Sum* row_shift;  // [rows] the cheapest cost of a row; Preparation leaves it here as a cost, in the first bytes
  Sum* gap;        // [rows] what the cheapest free column of a row costs above that, when last looked for,
  uint32_t* cheapest_column;  // [rows] and which it is
  int32_t* row_slot;          // [rows] slot that a row is matched to
  int32_t* waiting;           // [rows] rows that did not get their cheapest column
  int32_t* num_waiting;       // [1]
  uint32_t* slot_column;      // [rows]
  int32_t* slot_row;          // [rows]
  int32_t* previous;          // [rows] row before a slot on the shortest path to it
  uint32_t* taken;            // [columns / 32] bit set of the matched columns
  uint8_t* scanned;           // [rows] whether the path to a slot is final, until the next search begins

  // Returns the number of bytes, a multiple of 16.
  HOST_DEVICE size_t place(char* memory, int32_t rows, int32_t columns) {
    size_t used = 0;
    take(memory, used, dual, rows);
    take(memory, used, distance, rows);
    take(memory, used, row_dual, rows);
    take(memory, used, row_shift, rows);
    take(memory, used, gap, rows);
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

__device__ __forceinline__ bool is_taken(const uint32_t* taken, uint32_t column) {
  return taken[column / 32] >> column % 32 & 1;
}

// --- Costs of one problem, 1 <= rows <= columns ---

// In global memory: the cost of row i and column j is data[i * row_step + j * column_step].
template <typename T>
struct GlobalCosts {
  const T* data;
  int64_t row_step, column_step;
  int32_t rows;
  uint32_t columns;

  // The costs of a row, one after another.
  struct Reader {
    const T* next;
    int64_t step;

    __device__ __forceinline__ T read() {
      const T cost = __ldg(next);
      next += step;
      return cost;
    }
  };

  __device__ __forceinline__ T at(int32_t row, uint32_t column) const {
    return __ldg(data + row * row_step + column * column_step);
  }

  // Every `step`-th cost of a row from column `first` on.
  __device__ __forceinline__ Reader reader(int32_t row, uint32_t first, uint32_t step) const {
    return {data + row * row_step + first * column_step, step * column_step};
  }
};

// In shared memory, row by row. Threads that gather meet in the banks of their columns whatever the length of a row is,
// so rows are not padded.
template <typename T>
struct SharedCosts {
  const T* data;
  int32_t rows;
  uint32_t columns;

  struct Reader {
    const T* next;
    uint32_t step;

    __device__ __forceinline__ T read() {
      const T cost = *next;
      next += step;
      return cost;
    }
  };

  __device__ __forceinline__ T at(int32_t row, uint32_t column) const { return data[row * columns + column]; }

  __device__ __forceinline__ Reader reader(int32_t row, uint32_t first, uint32_t step) const {
    return {data + row * columns + first, step};
  }
};

// --- What costs are added up as ---

// A double; unusable costs as their sentinel.
struct InDoubles {
  using Sum = double;
  static constexpr double kInfinity = __builtin_huge_val();
  double sentinel;

  template <typename T>
  __device__ __forceinline__ double amount(T cost) const {
    return is_usable(cost) ? cost : sentinel;
  }
};

// An integer; only where all costs are usable and exact.
struct InFixedPoint {
  using Sum = int64_t;
  static constexpr int64_t kInfinity = INT64_MAX;
  FixedPoint point;

  __device__ __forceinline__ int64_t amount(float cost) const { return point.units(cost); }
};

// --- What is done once a problem ---

// Finds the cheapest column of every row, and what all costs have in common. With kFixedPoint it also looks whether
// they are exact in fixed point, with kCopies it copies them to `copy`, as SharedCosts has them.
template <typename T, typename Team, bool kFixedPoint, bool kCopies>
class Preparation {
 public:
  __device__ __forceinline__ Preparation(const GlobalCosts<T>& costs, const Workspace<double>& workspace, T* copy,
                                         Team& team)
      : costs_(costs), w_(workspace), copy_(copy), team_(team) {}

  // Ends with a barrier.
  __device__ __forceinline__ void run() {
    for (uint32_t word = team_.rank(); word < (costs_.columns + 31) / 32; word += Team::kSize) w_.taken[word] = 0;
    const bool all_usable = find_row_minima();
    bool some_unusable;
    if constexpr (kFixedPoint) {
      const uint32_t largest = ~team_.minimum(Minimum<uint32_t>{~largest_, 0}).bits;
      point_ = FixedPoint::of_largest(largest);
      some_unusable = largest > FixedPoint::magnitude(CostLimit<float>::kLargest);
      is_exact_ = !team_.any(!point_.is_exact(smallest_less_one_)) && !some_unusable;
    } else {
      some_unusable = team_.any(!all_usable);
    }
    if (some_unusable) find_sentinel();
    team_.sync();
  }

  // The same in all threads.
  __device__ __forceinline__ bool is_exact() const { return is_exact_; }
  __device__ __forceinline__ InFixedPoint in_fixed_point() const { return {point_}; }
  __device__ __forceinline__ InDoubles in_doubles() const { return {sentinel_}; }

 private:
  const GlobalCosts<T> costs_;
  const Workspace<double> w_;
  T* const copy_;
  Team& team_;
  double sentinel_ = 0;
  bool is_exact_ = false;
  FixedPoint point_ = FixedPoint::of_largest(0);
  uint32_t largest_ = 0, smallest_less_one_ = 0xffffffff;  // magnitudes that this thread saw

  // For kRows rows at once, so that many loads are in flight; rows beyond the last repeat it. Unusable costs count as
  // infinite. False if this thread saw one.
  __device__ __forceinline__ bool find_row_minima() {
    constexpr int kRows = 4;
    bool all_usable = true;
    for (int32_t first = team_.warp() * kRows; first < costs_.rows; first += Team::kWarps * kRows) {
      typename GlobalCosts<T>::Reader from[kRows];
      T* to[kRows];
      T best[kRows];
      uint32_t best_column[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int32_t row = min(first + r, costs_.rows - 1);
        from[r] = costs_.reader(row, team_.lane(), kWarpSize);
        to[r] = copy_ + row * costs_.columns;
        best[r] = static_cast<T>(InDoubles::kInfinity);
        best_column[r] = kNone;
      }
#pragma unroll 2
      for (uint32_t column = team_.lane(); column < costs_.columns; column += kWarpSize) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T raw = from[r].read();
          if constexpr (kCopies) to[r][column] = raw;
          if constexpr (kFixedPoint) see_magnitude(FixedPoint::magnitude(raw));
          const bool is_cost = is_usable(raw);
          all_usable &= is_cost;
          const T cost = is_cost ? raw : static_cast<T>(InDoubles::kInfinity);
          if (cost < best[r] || best_column[r] == kNone) {
            best[r] = cost;
            best_column[r] = column;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto cheapest =
            warp_minimum(Minimum<typename Ordered<T>::Bits>{Ordered<T>::bits(best[r]), best_column[r]});
        if (team_.lane() == 0 && first + r < costs_.rows) {
          const T value = Ordered<T>::value(cheapest.bits);
          __builtin_memcpy(&w_.row_shift[first + r], &value, sizeof(T));
          w_.cheapest_column[first + r] = cheapest.index;
        }
      }
    }
    return all_usable;
  }

  __device__ __forceinline__ void see_magnitude(uint32_t magnitude) {
    largest_ = max(largest_, magnitude);
    smallest_less_one_ = min(smallest_less_one_, magnitude - 1);
  }

  __device__ __forceinline__ void find_sentinel() {
    double smallest = InDoubles::kInfinity, largest = -InDoubles::kInfinity;
    for (int32_t row = team_.warp(); row < costs_.rows; row += Team::kWarps) {
      for (uint32_t column = team_.lane(); column < costs_.columns; column += kWarpSize) {
        const T cost = costs_.at(row, column);
        if (!is_usable(cost)) continue;
        smallest = cost < smallest ? cost : smallest;
        largest = cost > largest ? cost : largest;
      }
    }
    smallest = team_minimum(smallest);
    largest = -team_minimum(-largest);
    if (smallest <= largest) sentinel_ = sentinel_cost(smallest, largest, costs_.rows);
  }

  __device__ __forceinline__ double team_minimum(double value) {
    return Ordered<double>::value(team_.minimum(Minimum<uint64_t>{Ordered<double>::bits(value), 0}).bits);
  }
};

// --- The search ---

template <typename T, typename Team, typename Costs, typename Number>
class Search {
  using Sum = typename Number::Sum;

 public:
  __device__ __forceinline__ Search(const Costs& costs, const Number& number, const Workspace<Sum>& workspace,
                                    Team& team)
      : costs_(costs), number_(number), w_(workspace), team_(team) {}

  __device__ __forceinline__ void solve() {
    if (team_.warp() == 0) match_free_minima();
    team_.sync();
    const int32_t num_waiting = *w_.num_waiting;
    num_slots_ = costs_.rows - num_waiting;
    for (int32_t index = 0; index < num_waiting; ++index) augment(w_.waiting[index]);
  }

 private:
  struct Candidate {
    Sum gap;
    uint32_t column;
  };

  const Costs costs_;
  const Number number_;
  const Workspace<Sum> w_;
  Team& team_;
  int32_t num_slots_ = 0;

  // By one warp, a row per lane.
  __device__ __forceinline__ void match_free_minima() {
    const uint32_t lanes_before = (1u << team_.lane()) - 1;
    int32_t matched = 0;
    for (int32_t first = 0; first < costs_.rows; first += kWarpSize) {
      const int32_t row = first + team_.lane();
      const bool exists = row < costs_.rows;
      const uint32_t column = exists ? w_.cheapest_column[row] : kNone;
      if (exists) {
        T cheapest;
        __builtin_memcpy(&cheapest, &w_.row_shift[row], sizeof(T));
        w_.row_shift[row] = number_.amount(cheapest);
        w_.gap[row] = 0;
      }
      const uint32_t rivals = __match_any_sync(kAllLanes, column);
      const bool wins = exists && (rivals & lanes_before) == 0 && !is_taken(w_.taken, column);
      const uint32_t winners = __ballot_sync(kAllLanes, wins);
      __syncwarp();
      if (wins) {
        atomicOr(&w_.taken[column / 32], 1u << column % 32);
        const int32_t slot = matched + __popc(winners & lanes_before);
        w_.slot_column[slot] = column;
        w_.dual[slot] = w_.row_dual[slot] = 0;
        w_.scanned[slot] = false;
        match(row, slot);
      } else if (exists) {
        w_.waiting[first - matched + __popc(~winners & lanes_before)] = row;
      }
      matched += __popc(winners);
      __syncwarp();
    }
    if (team_.lane() == 0) *w_.num_waiting = costs_.rows - matched;
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
      // The search before this one has changed the duals of these, and maybe their rows.
      if (w_.scanned[slot]) {
        const int32_t row = w_.slot_row[slot];
        const Sum above_cheapest = number_.amount(costs_.at(row, w_.slot_column[slot])) - w_.row_shift[row];
        w_.row_dual[slot] = above_cheapest - w_.dual[slot];
      }
      w_.distance[slot] = Number::kInfinity;
      w_.scanned[slot] = false;
    }
    int32_t row = source, last_row = source;
    uint32_t last_column = kNone;
    Sum offset = 0;  // path length to `row` minus the dual of `row`
    Sum path_length = Number::kInfinity;
    for (int32_t turn = 0; turn <= num_slots_; ++turn) {
      if (offset + w_.gap[row] < path_length) {
        const Candidate cheapest = find_cheapest_free(row);
        const Sum length = offset + cheapest.gap;
        if (length < path_length) {
          path_length = length;
          last_row = row;
          last_column = cheapest.column;
        }
      }
      const Minimum<uint64_t> nearest = relax(row, offset);
      const Sum distance = Ordered<Sum>::value(nearest.bits);
      if (!(distance < path_length)) break;
      const int32_t slot = nearest.index;
      if (team_.rank() == slot % Team::kSize) w_.scanned[slot] = true;
      row = w_.slot_row[slot];
      offset = distance - w_.row_dual[slot];
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

  // The gap found before is a lower bound once its column is taken.
  __device__ __forceinline__ Candidate find_cheapest_free(int32_t row) {
    const uint32_t known = w_.cheapest_column[row];
    if (!is_taken(w_.taken, known)) return {w_.gap[row], known};
    typename Costs::Reader from = costs_.reader(row, team_.rank(), Team::kSize);
    T best = static_cast<T>(InDoubles::kInfinity);
    uint32_t best_column = kNone;
#pragma unroll 4
    for (uint32_t column = team_.rank(); column < costs_.columns; column += Team::kSize) {
      const T raw = from.read();
      const T cost = is_usable(raw) ? raw : static_cast<T>(InDoubles::kInfinity);
      if (!is_taken(w_.taken, column) && (cost < best || best_column == kNone)) {
        best = cost;
        best_column = column;
      }
    }
    const auto cheapest = team_.minimum(Minimum<typename Ordered<T>::Bits>{Ordered<T>::bits(best), best_column});
    const Candidate found = {number_.amount(Ordered<T>::value(cheapest.bits)) - w_.row_shift[row], cheapest.index};
    if (team_.rank() == 0) {
      w_.gap[row] = found.gap;
      w_.cheapest_column[row] = found.column;
    }
    return found;
  }

  // Shorten the paths to all slots by way of `row`; return the nearest slot that is not scanned.
  __device__ __forceinline__ Minimum<uint64_t> relax(int32_t row, Sum offset) {
    const Sum shift = w_.row_shift[row];
    Sum nearest = Number::kInfinity;
    uint32_t nearest_slot = kNone;
    for (int32_t slot = team_.rank(); slot < num_slots_; slot += Team::kSize) {
      if (w_.scanned[slot]) continue;
      const Sum length = number_.amount(costs_.at(row, w_.slot_column[slot])) - shift - w_.dual[slot] + offset;
      Sum distance = w_.distance[slot];
      if (length < distance) {
        w_.distance[slot] = distance = length;
        w_.previous[slot] = row;
      }
      if (distance < nearest) {
        nearest = distance;
        nearest_slot = slot;
      }
    }
    return team_.minimum(Minimum<uint64_t>{Ordered<Sum>::bits(nearest), nearest_slot});
  }

  // Hand each slot on the path to the row before it, back to the source.
  __device__ __forceinline__ void match_path(int32_t source, int32_t last_row, uint32_t last_column) const {
    int32_t row = last_row, slot = num_slots_;
    w_.slot_column[slot] = last_column;
    w_.dual[slot] = 0;
    w_.scanned[slot] = true;  // its row's dual is not known yet
    for (int32_t step = 0; step < num_slots_ && row != source; ++step) {
      const int32_t old_slot = w_.row_slot[row];
      match(row, slot);
      slot = old_slot;
      row = w_.previous[slot];
    }
    match(source, slot);
  }
};

}  // namespace
}  // namespace groupdetr
