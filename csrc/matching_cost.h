// The cost of matching one query to one target, shared by the CPU and the CUDA kernels.
//
//   cost = class_weight * focal + l1_weight * |query - target|_1 - giou_weight * GIoU(query, target)
//
// NaN and infinities in a logit or a box go through to the cost.
#pragma once

#include "focal.h"
#include "host_device.h"

namespace groupdetr {

template <typename T>
struct CostWeights {
  T class_weight, l1_weight, giou_weight, alpha, gamma;
};

// class_weight * (focal loss of the class if present - focal loss if absent). kSquare promises gamma == 2.
template <bool kSquare, typename T>
HOST_DEVICE T class_cost(T logit, const CostWeights<T>& weights) {
  const ClassProbability<T> p = class_probability(logit);
  const T if_present = focal_factor<kSquare>(p.absent, p.minus_log_absent, weights.gamma) * p.minus_log_present;
  const T if_absent = focal_factor<kSquare>(p.present, p.minus_log_present, weights.gamma) * p.minus_log_absent;
  return weights.class_weight * (weights.alpha * if_present - (1 - weights.alpha) * if_absent);
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
