// The counter-based generator of attention dropout, shared by the CPU and the GPU kernels. Defined and explained in
// groupdetr_fast/ops/_dropout.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace groupdetr {

HOST_DEVICE uint32_t dropout_word(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0xD35A2D97u;
  return x ^ (x >> 15);
}

struct DropoutRow {
  uint32_t head_word0, slope, offset;
};

HOST_DEVICE DropoutRow dropout_row(uint64_t seed, uint32_t head, uint32_t row) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const uint32_t head_word0 = dropout_word(dropout_word(dropout_word(low) ^ high) ^ head);
  const uint32_t head_word1 = dropout_word(dropout_word(dropout_word(high + 0x9E3779B9u) ^ low) ^ head);
  return {head_word0, dropout_word(head_word0 ^ row), dropout_word(head_word1 ^ row)};
}

HOST_DEVICE bool dropout_keep(DropoutRow row, uint32_t column, uint32_t threshold) {
  const uint32_t place = column * 0x9E3779B9u + row.head_word0;
  const uint32_t point = (place * place) ^ place;
  return row.slope * point + row.offset >= threshold;
}

HOST_DEVICE uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace groupdetr
