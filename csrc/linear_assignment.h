// Which costs an assignment problem uses as they are, what stands in for the others, and the order of costs as bits.
// Shared by CPU and CUDA.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace groupdetr {

// Largest magnitude that counts as a cost: larger values are guards such as finfo.max, whose sums would overflow or
// absorb every real difference.
template <typename T>
struct CostLimit;
template <>
struct CostLimit<float> {
  static constexpr float kLargest = 1e30f;
};
template <>
struct CostLimit<double> {
  static constexpr double kLargest = 1e300;
};

// False for NaN, infinities and absurd magnitudes. Written so that NaN fails the comparisons.
template <typename T>
HOST_DEVICE bool is_usable(T cost) {
  return cost >= -CostLimit<T>::kLargest && cost <= CostLimit<T>::kLargest;
}

// The finite cost of an unusable pair: one more of them costs more than any change of the `pairs - 1` other pairs can
// save, so an optimal assignment holds as few of them as possible. `smallest` and `largest` are the usable costs.
HOST_DEVICE double sentinel_cost(double smallest, double largest, int64_t pairs) {
  double range = largest - smallest;
  if (range == 0) {
    const double magnitude = largest < 0 ? -largest : largest;
    range = magnitude > 1 ? magnitude : 1;
  }
  return largest + static_cast<double>(pairs + 1) * range;
}

// Bits that compare as unsigned integers as the values do, for a value that is not NaN. Both zeros have the same bits.
HOST_DEVICE uint64_t ordered_bits(double value) {
  const double without_negative_zero = value + 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &without_negative_zero, sizeof(bits));
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

HOST_DEVICE double from_ordered_bits(uint64_t ordered) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  const uint64_t bits = ordered & kSign ? ordered ^ kSign : ~ordered;
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace groupdetr
