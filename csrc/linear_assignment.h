// Which costs an assignment problem uses as they are, and what stands in for the others. Shared by CPU and CUDA.
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

}  // namespace groupdetr
