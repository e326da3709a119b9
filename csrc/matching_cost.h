// The cost of matching one query to one target, shared by the CPU and the CUDA kernels.
//
//   cost = class_weight * focal + l1_weight * |query - target|_1 - giou_weight * GIoU(query, target)
//
// The float functions are polynomials rather than library calls, so that loops over them become vector code. They are
// accurate to a few units in the last place, and NaN and infinities go through them to the cost.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace groupdetr {

template <typename T>
struct CostWeights {
  T class_weight, l1_weight, giou_weight, alpha, gamma;
};

template <typename T>
HOST_DEVICE T absolute(T x) {
  return x < 0 ? -x : x;
}

// exp(x) for x <= 0; smaller x than -87 count as -87, where exp is about 1e-38.
HOST_DEVICE float exp_nonpositive(float x) {
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits of the sum.
  constexpr float kRounder = 12582912.0f;
  constexpr uint32_t kRounderBits = 0x4B400000;
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  const float r = (x - whole * kLn2High) - whole * kLn2Low;
  // Minimax polynomial of (exp(r) - 1 - r) / r^2 for |r| <= 0.35; relative error of the result 4e-9.
  float poly = 0.00138131424f;
  poly = poly * r + 0.00836941879f;
  poly = poly * r + 0.0416684560f;
  poly = poly * r + 0.166665152f;
  poly = poly * r + 0.499999940f;
  const float fraction = (poly * r) * r + r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - kRounderBits + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return fraction * power;
}

HOST_DEVICE double exp_nonpositive(double x) { return std::exp(x); }

// log(1 + t) for t in [0, 1], as 2 atanh(t / (2 + t)).
HOST_DEVICE float log1p_unit(float t) {
  const float s = t / (2.0f + t);
  const float z = s * s;
  // Minimax polynomial of (atanh(s) / s - 1) / z for z <= 1/9; relative error of the result 5e-9.
  float poly = 0.140122324f;
  poly = poly * z + 0.139995694f;
  poly = poly * z + 0.200108498f;
  poly = poly * z + 0.333332062f;
  const float twice = 2.0f * s;
  return (poly * z) * twice + twice;
}

HOST_DEVICE double log1p_unit(double t) { return std::log1p(t); }

// class_weight * (focal loss of the class if present - focal loss if absent). kSquare promises gamma == 2.
template <bool kSquare, typename T>
HOST_DEVICE T class_cost(T logit, const CostWeights<T>& weights) {
  const T t = exp_nonpositive(-absolute(logit));
  const T rest = log1p_unit(t);
  const T minus_log_present = rest + (logit < 0 ? -logit : T(0));
  const T minus_log_absent = rest + (logit > 0 ? logit : T(0));
  T present, absent;  // the focal factors (1 - p)^gamma and p^gamma
  if constexpr (kSquare) {
    const T larger = 1 / (1 + t);
    const T smaller = t * larger;
    present = logit < 0 ? larger : smaller;
    absent = logit < 0 ? smaller : larger;
    present *= present;
    absent *= absent;
  } else {
    present = exp_nonpositive(-weights.gamma * minus_log_absent);
    absent = exp_nonpositive(-weights.gamma * minus_log_present);
  }
  const T focal_present = weights.alpha * present * minus_log_present;
  const T focal_absent = (1 - weights.alpha) * absent * minus_log_absent;
  return weights.class_weight * (focal_present - focal_absent);
}

template <typename T>
struct Box {
  T cx, cy, width, height;
  T left, top, right, bottom;
  T area;
};

template <typename T>
HOST_DEVICE Box<T> make_box(T cx, T cy, T width, T height) {
  const T half_width = width / 2, half_height = height / 2;
  Box<T> box{cx, cy, width, height, cx - half_width, cy - half_height, cx + half_width, cy + half_height, T(0)};
  box.area = (box.right - box.left) * (box.bottom - box.top);
  return box;
}

template <typename T>
HOST_DEVICE T smaller_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
HOST_DEVICE T larger_of(T a, T b) {
  return a > b ? a : b;
}

// numerator / denominator, and 0 where the denominator is 0: two empty boxes at one place have IoU 0.
template <typename T>
HOST_DEVICE T safe_divide(T numerator, T denominator) {
  const bool zero = denominator == 0;
  return (zero ? T(0) : numerator) / (zero ? T(1) : denominator);
}

template <typename T>
HOST_DEVICE T box_cost(const Box<T>& a, const Box<T>& b, const CostWeights<T>& weights) {
  const T l1 =
      absolute(a.cx - b.cx) + absolute(a.cy - b.cy) + absolute(a.width - b.width) + absolute(a.height - b.height);
  const T overlap_width = smaller_of(a.right, b.right) - larger_of(a.left, b.left);
  const T overlap_height = smaller_of(a.bottom, b.bottom) - larger_of(a.top, b.top);
  const T intersection = larger_of(overlap_width, T(0)) * larger_of(overlap_height, T(0));
  const T total = a.area + b.area - intersection;
  const T hull_width = larger_of(a.right, b.right) - smaller_of(a.left, b.left);
  const T hull_height = larger_of(a.bottom, b.bottom) - smaller_of(a.top, b.top);
  const T hull = hull_width * hull_height;
  const T giou = safe_divide(intersection, total) - safe_divide(hull - total, hull);
  return weights.l1_weight * l1 - weights.giou_weight * giou;
}

}  // namespace groupdetr
