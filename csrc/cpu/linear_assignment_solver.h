// The search of linear_assignment.cpp, which includes this once for each SOLVER_BYTES of a vector, in SOLVER_NAMESPACE.

namespace groupdetr {
namespace {
namespace SOLVER_NAMESPACE {

constexpr int kBytes = SOLVER_BYTES;

template <typename T, int kBytesOfVector = kBytes>
struct Lanes {
  static constexpr int kLanes = kBytesOfVector / static_cast<int>(sizeof(T));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Values __attribute__((vector_size(kBytesOfVector)));
  typedef Int Ints __attribute__((vector_size(kBytesOfVector)));

  // 0, 1, 2, ... and so on.
  static inline Ints indices() {
    Ints result;
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = lane;
    return result;
  }
};

template <typename V>
inline V load(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

template <typename V>
inline void store(void* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

// A vector of costs as doubles. gcc 12 takes four instructions for what is one.
template <typename T>
inline typename Lanes<double>::Values load_doubles(const T* from) {
  if constexpr (sizeof(T) == 8) {
    return load<typename Lanes<double>::Values>(from);
  } else {
#if SOLVER_BYTES == 64
    return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));  // without a mask gcc 12 warns of its own header
#elif SOLVER_BYTES == 32
    return _mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    typedef T Costs __attribute__((vector_size(Lanes<double>::kLanes * sizeof(T))));
    return __builtin_convertvector(load<Costs>(from), typename Lanes<double>::Values);
#endif
  }
}

// Smallest value over the lanes; among equal ones that of the smallest index.
template <typename T, int kBytesOfVector = kBytes>
inline Minimum<T> minimum_over_lanes(const typename Lanes<T, kBytesOfVector>::Values& values,
                                     const typename Lanes<T, kBytesOfVector>::Ints& indices) {
  constexpr int kHalf = kBytesOfVector / 2;
  using Values = typename Lanes<T, kHalf>::Values;
  using Ints = typename Lanes<T, kHalf>::Ints;
  const Values low = load<Values>(&values);
  const Values high = load<Values>(reinterpret_cast<const char*>(&values) + kHalf);
  const Ints low_index = load<Ints>(&indices);
  const Ints high_index = load<Ints>(reinterpret_cast<const char*>(&indices) + kHalf);
  const auto take_high = (high < low) | ((high == low) & (high_index < low_index));
  const Values value = take_high ? high : low;
  const Ints index = take_high ? high_index : low_index;
  if constexpr (Lanes<T, kHalf>::kLanes == 1) {
    return {value[0], index[0]};
  } else {
    return minimum_over_lanes<T, kHalf>(value, index);
  }
}

// The smallest value seen so far in each lane, and where. Two of them are filled in turn, because each step of one
// waits for the step before.
template <typename T>
struct Smallest {
  typename Lanes<T>::Values value;
  typename Lanes<T>::Ints index;

  // No constructor, since one that the compiler adds would not be compiled for these vectors.
  static inline Smallest of_none() {
    return {typename Lanes<T>::Values{} + std::numeric_limits<T>::infinity(), Lanes<T>::indices()};
  }

  inline void see(const typename Lanes<T>::Values& values, const typename Lanes<T>::Ints& indices) {
    index = values < value ? indices : index;
    value = values < value ? values : value;
  }

  inline Minimum<T> of_both(const Smallest& other) const {
    const auto take_other = (other.value < value) | ((other.value == value) & (other.index < index));
    const typename Lanes<T>::Values values = take_other ? other.value : value;
    const typename Lanes<T>::Ints indices = take_other ? other.index : index;
    return minimum_over_lanes<T>(values, indices);
  }
};

// Smallest entry of `row` and its first position. With kMasked, `blocked` is added to the row; without, `magnitudes`
// collects the largest bit pattern of an absolute value, which tells unusable costs: NaN and infinities come last.
template <typename T, bool kMasked>
inline Minimum<T> row_minimum(const T* row, const T* blocked, int64_t size, typename Lanes<T>::Ints& magnitudes) {
  using Values = typename Lanes<T>::Values;
  using Ints = typename Lanes<T>::Ints;
  using Int = typename Lanes<T>::Int;
  constexpr int kLanes = Lanes<T>::kLanes;

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

  Smallest<T> even = Smallest<T>::of_none(), odd = even;
  const Ints lanes = Lanes<T>::indices();
  const auto step = [&](Smallest<T>& smallest, int64_t at) __attribute__((always_inline)) {
    Values values = load<Values>(row + at);
    if constexpr (kMasked) {
      values += load<Values>(blocked + at);
    } else {
      const Ints bits = load<Ints>(row + at) & std::numeric_limits<Int>::max();
      magnitudes = bits > magnitudes ? bits : magnitudes;
    }
    smallest.see(values, lanes + static_cast<Int>(at));
  };
  int64_t at = 0;
  for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
    step(even, at);
    step(odd, at + kLanes);
  }
  if (at + kLanes <= size) step(even, at);
  step(odd, size - kLanes);  // The tail may see some entries twice, which changes no minimum.
  return even.of_both(odd);
}

template <typename T>
class Solver {
 public:
  Solver(const T* costs, int64_t row_stride, int64_t rows, int64_t columns, Workspace& workspace)
      : costs_(costs),
        row_stride_(row_stride),
        rows_(rows),
        columns_(columns),
        w_(workspace),
        blocked_(static_cast<T*>(workspace.blocked)),
        slot_costs_(static_cast<T*>(workspace.slot_costs)) {}

  bool solve() {
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
  T* slot_costs_;
  int64_t num_slots_ = 0;
  int64_t num_waiting_ = 0;

  bool find_row_minima() {
    constexpr int64_t kRowsAhead = 3;  // Large batches come from memory, whose delay is about the time of three rows.
    constexpr int64_t kCostsOfLine = 64 / sizeof(T);
    typename Lanes<T>::Ints magnitudes = {};
    for (int64_t row = 0; row < rows_; ++row) {
      const T* ahead = costs_ + std::min(row + kRowsAhead, rows_ - 1) * row_stride_;
      for (int64_t column = 0; column < columns_; column += kCostsOfLine) __builtin_prefetch(ahead + column);
      const Minimum<T> cheapest = row_minimum<T, false>(costs_ + row * row_stride_, nullptr, columns_, magnitudes);
      w_.cheapest_column[row] = static_cast<int32_t>(cheapest.index);
      w_.cheapest_cost[row] = cheapest.value;
    }
    constexpr T kLargest = CostLimit<T>::kLargest;
    typename Lanes<T>::Int limit;
    __builtin_memcpy(&limit, &kLargest, sizeof(T));
    bool usable = true;
    for (int lane = 0; lane < Lanes<T>::kLanes; ++lane) usable &= magnitudes[lane] <= limit;
    return usable;
  }

  void match_free_minima() {
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

  int64_t add_slot(int32_t column) {
    w_.slot_column[num_slots_] = column;
    w_.dual[num_slots_] = 0;
    blocked_[column] = std::numeric_limits<T>::infinity();
    return num_slots_++;
  }

  void match(int64_t row, int64_t slot) {
    w_.row_slot[row] = static_cast<int32_t>(slot);
    w_.slot_row[slot] = static_cast<int32_t>(row);
  }

  // Find the shortest path from `source` to a free column, by Dijkstra over the slots, and match along it. Every turn
  // of the loop scans one more slot, so it ends; among paths of equal length one that ends here is taken.
  void augment(int64_t source) {
    int64_t num_scanned = 0;
    int64_t row = source;
    double offset = 0;  // path length to `row` minus the dual of `row`
    double path_length = kInfinity;
    int64_t last = 0;  // position in the search of the row that the path ends from
    while (true) {
      w_.scanned_row[num_scanned] = static_cast<int32_t>(row);
      w_.scanned_offset[num_scanned] = offset;
      if (offset + (w_.cheapest_cost[row] - w_.row_shift[row]) < path_length) {
        refresh_cheapest(row);
        const double length = offset + (w_.cheapest_cost[row] - w_.row_shift[row]);
        if (length < path_length) {
          path_length = length;
          last = num_scanned;
        }
      }
      gather(row);
      const Minimum<double> nearest = num_scanned == 0 ? relax<true>(row, offset) : relax<false>(row, offset);
      if (!(nearest.value < path_length) || num_scanned == num_slots_) break;
      const int64_t slot = nearest.index;
      w_.scanned_slot[num_scanned] = static_cast<int32_t>(slot);
      w_.scanned_distance[num_scanned] = nearest.value;
      w_.scanned_dual[num_scanned] = w_.dual[slot];
      ++num_scanned;
      row = w_.slot_row[slot];
      gather(row);
      offset = nearest.value - length_from(row, slot, w_.dual[slot], 0);
      w_.dual[slot] = -kInfinity;  // makes every further path to this slot infinitely long
      w_.distance[slot] = kInfinity;
    }
    match_along_path(last);
    for (int64_t index = 0; index < num_scanned; ++index) {
      w_.dual[w_.scanned_slot[index]] = w_.scanned_dual[index] + (w_.scanned_distance[index] - path_length);
    }
  }

  // The path runs from the first row of the search to the row at position `last`, and on to that row's cheapest column.
  void match_along_path(int64_t last) {
    int64_t slot = add_slot(w_.cheapest_column[w_.scanned_row[last]]);
    while (last > 0) {
      const int64_t row = w_.scanned_row[last];
      const int64_t old_slot = w_.row_slot[row];
      match(row, slot);
      slot = old_slot;
      last = position_before(slot, last - 1);
    }
    match(w_.scanned_row[0], slot);
  }

  // Position of the row from which the search reached `slot`, the one scanned as number `index`: the first row whose
  // length is the slot's. The same sums give the same bits.
  int64_t position_before(int64_t slot, int64_t index) const {
    const double dual = w_.scanned_dual[index];
    int64_t position = 0;
    while (position < index && length_from(w_.scanned_row[position], slot, dual, w_.scanned_offset[position]) !=
                                   w_.scanned_distance[index]) {
      ++position;
    }
    return position;
  }

  void refresh_cheapest(int64_t row) {
    if (blocked_[w_.cheapest_column[row]] == 0) return;
    typename Lanes<T>::Ints unused = {};
    const Minimum<T> cheapest = row_minimum<T, true>(costs_ + row * row_stride_, blocked_, columns_, unused);
    w_.cheapest_column[row] = static_cast<int32_t>(cheapest.index);
    w_.cheapest_cost[row] = cheapest.value;
  }

  T* row_costs(int64_t row) const { return slot_costs_ + row * w_.slot_capacity; }

  void gather(int64_t row) {
    const T* from = costs_ + row * row_stride_;
    T* to = row_costs(row);
    int64_t slot = w_.gathered[row];
#if SOLVER_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      for (; slot < num_slots_; slot += 16) {
        const int64_t left = num_slots_ - slot;
        const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
        const __m512i columns = _mm512_maskz_loadu_epi32(mask, w_.slot_column + slot);
        _mm512_mask_storeu_ps(to + slot, mask, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, columns, from, 4));
      }
    }
#endif
    for (; slot < num_slots_; ++slot) to[slot] = from[w_.slot_column[slot]];
    w_.gathered[row] = static_cast<int32_t>(num_slots_);
  }

  // Length of a path that goes on from `row` to `slot`, as relax() adds it up.
  double length_from(int64_t row, int64_t slot, double dual, double offset) const {
    return static_cast<double>(row_costs(row)[slot]) - w_.row_shift[row] - dual + offset;
  }

  // Shorten the paths to all slots by way of `row`, which are infinitely long at the first one; return the nearest slot
  // that is not scanned.
  template <bool kFirst>
  Minimum<double> relax(int64_t row, double offset) {
    using Values = typename Lanes<double>::Values;
    using Ints = typename Lanes<double>::Ints;
    constexpr int kLanes = Lanes<double>::kLanes;
    static_assert(kSlotsAtATime % (2 * kLanes) == 0);
    // Copied, since for all the compiler knows the stores below change what they are copied from.
    const int64_t num_slots = num_slots_;
    const T* costs = row_costs(row);
    const double* dual = w_.dual;
    double* distance = w_.distance;
    const double shift = w_.row_shift[row];
    Smallest<double> even = Smallest<double>::of_none(), odd = even;
    Ints index = Lanes<double>::indices();
    // Entries beyond the last slot have dual -inf: whatever their cost, they are never nearer than +inf.
    const auto step = [&](Smallest<double>& smallest, int64_t slot) __attribute__((always_inline)) {
      Values length = load_doubles(costs + slot) - shift - load<Values>(dual + slot) + offset;
      if constexpr (!kFirst) {
        const Values old = load<Values>(distance + slot);
        length = length < old ? length : old;
      }
      store(distance + slot, length);
      smallest.see(length, index);
      index += kLanes;
    };
    for (int64_t slot = 0; slot < num_slots; slot += 2 * kLanes) {
      step(even, slot);
      step(odd, slot + kLanes);
    }
    return even.of_both(odd);
  }
};

}  // namespace SOLVER_NAMESPACE
}  // namespace
}  // namespace groupdetr

#undef SOLVER_BYTES
#undef SOLVER_NAMESPACE
