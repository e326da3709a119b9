// Which costs an assignment problem uses as they are, what stands in for the others, the order of costs as bits, and
// costs as integers that add up exactly. Shared by CPU and CUDA.
#pragma once

#include <cmath>
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

// False for NaN, infinities and absurd magnitudes. Written so that NaN fails the comparison.
template <typename T>
HOST_DEVICE bool is_usable(T cost) {
  return std::fabs(cost) <= CostLimit<T>::kLargest;
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

// Bits that compare as unsigned integers as the values do, for a value that is not NaN, and the value of such bits.
// Both zeros have the same bits.
template <typename T>
struct Ordered;

template <typename T, typename B>
struct OrderedFloats {
  using Bits = B;
  static constexpr B kSign = B{1} << (8 * sizeof(B) - 1);

  static HOST_DEVICE B bits(T value) {
    const T without_negative_zero = value + T{0};
    B bits;
    __builtin_memcpy(&bits, &without_negative_zero, sizeof(bits));
    return bits & kSign ? ~bits : bits | kSign;
  }

  static HOST_DEVICE T value(B ordered) {
    const B bits = ordered & kSign ? ordered ^ kSign : ~ordered;
    T value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

template <>
struct Ordered<float> : OrderedFloats<float, uint32_t> {};
template <>
struct Ordered<double> : OrderedFloats<double, uint64_t> {};
template <>
struct Ordered<int64_t> {
  using Bits = uint64_t;
  static constexpr uint64_t kSign = uint64_t{1} << 63;
  static HOST_DEVICE uint64_t bits(int64_t value) { return static_cast<uint64_t>(value) ^ kSign; }
  static HOST_DEVICE int64_t value(uint64_t ordered) { return static_cast<int64_t>(ordered ^ kSign); }
};

// Float32 costs as integers, in units of 2^(exponent - 150) for the `exponent` of this problem, so that a search adds
// and compares integers where it would else add and compare doubles. Whether a problem is `exact`ly so is seen from the
// magnitudes of its costs. If it is, the search makes the same decisions with integers as with doubles, for no sum of
// either kind is rounded:
//   - Every cost is 0 or a normal float with an exponent between `exponent` and `exponent + kSpread`: a multiple of the
//     unit, smaller than 2^(24 + kSpread) = 2^50 units. The largest and the smallest cost of a problem are at most
//     R = 2^51 units apart.
//   - A row's costs count above its smallest one, so they lie in [0, R]. Until the last search is over there is a
//   column
//     that is not matched, and the dual of every such column is 0. So a shortest path has a length of at most R, the
//     direct way to that column; a row's dual is at most its cost at that column, which makes it one of [0, R]; and the
//     dual of a matched column, which is the cost of its pair less the dual of its row, lies in [-R, 0].
//   - Hence the length of a path less the dual of the row at its end lies in [-R, R], and what is made of it, of a cost
//     and of a dual lies in [-R, 3 R], also before its last addition: it is a multiple of the unit below 2^53 units,
//     which is a double. So is that length and the gap of its last row, of which a stale one lies in [0, R] too.
class FixedPoint {
 public:
  static constexpr int32_t kSpread = 26;

  // The bits of a cost without its sign, which compare as its magnitude does.
  static HOST_DEVICE uint32_t magnitude(float cost) {
    uint32_t bits;
    __builtin_memcpy(&bits, &cost, sizeof(bits));
    return bits & 0x7fffffff;
  }

  // Of the problem whose largest magnitude this is.
  static HOST_DEVICE FixedPoint of_largest(uint32_t magnitude) {
    const int32_t exponent = static_cast<int32_t>(magnitude >> kMantissaBits) - kSpread;
    return FixedPoint(exponent > 1 ? exponent : 1);
  }

  // Whether all costs are exact, by their smallest magnitude without zeros, less 1; it is 2^32 - 1 if all are zero.
  HOST_DEVICE bool is_exact(uint32_t smallest_less_one) const {
    return smallest_less_one >= (static_cast<uint32_t>(exponent_) << kMantissaBits) - 1;
  }

  HOST_DEVICE int64_t units(float cost) const {
    int32_t bits;
    __builtin_memcpy(&bits, &cost, sizeof(bits));
    const int32_t mantissa = (bits & (kHiddenBit - 1)) | kHiddenBit;
    // Negative for zeros alone, whose hidden bit is 0.
    const int32_t shift = (bits >> kMantissaBits & 0xff) - exponent_;
    const int32_t factor = shift < 0 ? 0 : int32_t{1} << shift;
    return static_cast<int64_t>(bits < 0 ? -mantissa : mantissa) * factor;
  }

 private:
  static constexpr int32_t kMantissaBits = 23, kHiddenBit = 1 << kMantissaBits;

  explicit HOST_DEVICE FixedPoint(int32_t exponent) : exponent_(exponent) {}

  int32_t exponent_;  // as the bits have it
};

}  // namespace groupdetr
