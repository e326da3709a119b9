// What csrc/cuda/tensor_cores.cuh has the tensor cores do, on the CPU: all lanes of the warp give their registers, and
// each puts the matrices together that it needs.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu {

template <typename T>
float wide_half(uint16_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return static_cast<float>(value);
}

// What every lane has in two registers, by one exchange.
struct Registers {
  Contributions all;

  Registers(const Site& site, uint32_t first, uint32_t second)
      : all(exchange("mma", site, 0xffffffff, first | static_cast<uint64_t>(second) << 32)) {
    if (all.lanes != 0xffffffff) fail("mma without all lanes of the warp");
  }

  uint16_t half(int lane, int index, int upper) const {
    return static_cast<uint16_t>(all.values[lane] >> (32 * index + 16 * upper));
  }
};

// mma.sync.aligned.m16n8k16.row.col.f32 with a and b of type T. The products of a sum are added up in the order of k.
template <typename T>
CUDA_ON_CPU_OWN void add_product(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SITE) {
  const Registers of_a[2] = {{site, a[0], a[1]}, {site, a[2], a[3]}}, of_b(site, b[0], b[1]);
  const int group = lane() / 4, own = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * own + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;  // of column k of a, and of row k of b, among the four lanes of a group
      const float left = wide_half<T>(of_a[k / 8].half(row % 8 * 4 + owner, row / 8, k % 2));
      sums[i] += left * wide_half<T>(of_b.half(column * 4 + owner, k / 8, k % 2));
    }
  }
}

// movmatrix.sync.aligned.m8n8.trans.b16
CUDA_ON_CPU_OWN inline uint32_t transposed(uint32_t own, SITE) {
  const Contributions all = exchange("movmatrix", site, 0xffffffff, own);
  if (all.lanes != 0xffffffff) fail("movmatrix without all lanes of the warp");
  const int row = lane() / 4, column = lane() % 4 * 2;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {  // column i of the pair in the result is row column + i of the source
    const uint64_t word = all.values[(column + i) * 4 + row / 2];
    result |= static_cast<uint32_t>(word >> (16 * (row % 2)) & 0xffff) << (16 * i);
  }
  return result;
}

}  // namespace cuda_on_cpu
