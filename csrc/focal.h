// Sigmoid, its logarithms and the focal factor of a logit, as matching costs and the class loss use them.
//
// The float functions are polynomials rather than library calls, so that loops over them become vector code. They are
// accurate to a few units in the last place, and NaN and infinities go through them.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace groupdetr {

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

// What a logit says of its class. The logarithms are exact also where a probability is 0 or 1 in floating point.
template <typename T>
struct ClassProbability {
  T present, absent;
  T minus_log_present, minus_log_absent;
};

template <typename T>
HOST_DEVICE ClassProbability<T> class_probability(T logit) {
  const T t = exp_nonpositive(-absolute(logit));
  const T rest = log1p_unit(t);
  const T larger = 1 / (1 + t);
  const T smaller = t * larger;
  return {logit < 0 ? smaller : larger, logit < 0 ? larger : smaller, rest + (logit < 0 ? -logit : T(0)),
          rest + (logit > 0 ? logit : T(0))};
}

// The focal factor probability^gamma. kSquare promises gamma == 2.
template <bool kSquare, typename T>
HOST_DEVICE T focal_factor(T probability, T minus_log_probability, T gamma) {
  if constexpr (kSquare) {
    return probability * probability;
  } else {
    return exp_nonpositive(-gamma * minus_log_probability);
  }
}

}  // namespace groupdetr
