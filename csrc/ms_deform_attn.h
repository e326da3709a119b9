// Arithmetic of multi-scale deformable attention, shared by the CPU and the CUDA kernels: which pixels of a feature map
// a sampling location touches, and with which weights.
//
// A location in [0, 1] lies at `location * size - 0.5` pixels (pixel centres at whole numbers), as grid_sample with
// align_corners=False has it. Outside the map all values are zero. The sampled value and its derivatives are sums over
// 2 x 2 corners,
//
//   sample      = sum_ij  y_weight[i] * x_weight[j] * value[y[i], x[j]]
//   d sample/dx = sum_ij  y_weight[i] * x_slope[j]  * value[y[i], x[j]]
//   d sample/dy = sum_ij  y_slope[i]  * x_weight[j] * value[y[i], x[j]]
//
// with i and j in {low, high}, x and y in pixels. A corner outside the map keeps a valid index (that of its neighbour)
// and has weight and slope zero, so no kernel needs a branch for it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace groupdetr {

template <typename T>
struct AxisCorners {
  int32_t low, high;  // indices
  T low_weight, high_weight;
  T low_slope, high_slope;
};

template <typename T>
HOST_DEVICE T to_pixels(T location, T size) {
  return location * size - T(0.5);
}

// Whether a sample touches the map at all. Written so that NaN, infinities and empty maps answer false.
template <typename T>
HOST_DEVICE bool is_inside(T x, T y, T width, T height) {
  return (x > T(-1)) & (x < width) & (y > T(-1)) & (y < height) & (width > T(0)) & (height > T(0));
}

// `position` must lie in (-1, size).
template <typename T>
HOST_DEVICE AxisCorners<T> axis_corners(T position, int32_t size) {
  // Without conditional expressions, so that compilers vectorise loops over samples.
  const int32_t truncated = static_cast<int32_t>(position);
  const int32_t low = truncated - static_cast<int32_t>(static_cast<T>(truncated) > position);
  const int32_t low_inside = low >= 0, high_inside = low + 1 < size;
  const T low_one = static_cast<T>(low_inside), high_one = static_cast<T>(high_inside);
  const T fraction = position - static_cast<T>(low);
  return {low + 1 - low_inside, low + high_inside, low_one * (T(1) - fraction),
          high_one * fraction,  -low_one,          high_one};
}

}  // namespace groupdetr
