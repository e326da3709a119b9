// The focal loss of one logit whose class is absent, and its derivative.
//
//   loss(x) = p^gamma * -log(1 - p)          loss'(x) = p^gamma * (gamma * (1 - p) * -log(1 - p) + p)
//
// with p = sigmoid(x). By symmetry the loss of a logit x whose class is present is loss(-x).
#pragma once

#include "focal.h"

namespace groupdetr {

// What a row of target classes holds besides classes.
constexpr int64_t kNoObject = -1;  // all classes are absent
constexpr int64_t kIgnored = -2;   // the row does not count

template <bool kSquare, typename T>
HOST_DEVICE T focal_loss(T logit, T gamma) {
  const ClassProbability<T> p = class_probability(logit);
  return focal_factor<kSquare>(p.present, p.minus_log_present, gamma) * p.minus_log_absent;
}

template <bool kSquare, typename T>
HOST_DEVICE T focal_loss_derivative(T logit, T gamma) {
  const ClassProbability<T> p = class_probability(logit);
  const T factor = focal_factor<kSquare>(p.present, p.minus_log_present, gamma);
  return factor * (gamma * p.absent * p.minus_log_absent + p.present);
}

}  // namespace groupdetr
