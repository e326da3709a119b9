// The products and the transposition of csrc/cuda/tensor_cores.cuh, of registers that the caller gives, for tests of
// the emulator.

#include "cuda/tensor_cores.cuh"

namespace {

template <typename T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* sums) {
  const unsigned lane = threadIdx.x;
  uint32_t own_a[4], own_b[2];
  float own[4];
  for (int i = 0; i < 4; ++i) own_a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) own_b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) own[i] = sums[4 * lane + i];
  groupdetr::add_product<T>(own, own_a, own_b);
  for (int i = 0; i < 4; ++i) sums[4 * lane + i] = own[i];
}

__global__ void transpose(uint32_t* words) { words[threadIdx.x] = groupdetr::transposed(words[threadIdx.x]); }

__global__ void transpose_in_some_lanes(uint32_t* words) {
  if (threadIdx.x != 5) words[threadIdx.x] = groupdetr::transposed(words[threadIdx.x]);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int run_product_float16(const uint32_t* a, const uint32_t* b, float* sums) {
  return launch(product<__half>, a, b, sums);
}
EXPORT int run_product_bfloat16(const uint32_t* a, const uint32_t* b, float* sums) {
  return launch(product<__nv_bfloat16>, a, b, sums);
}
EXPORT int run_transpose(uint32_t* words) { return launch(transpose, words); }
EXPORT int run_transpose_in_some_lanes(uint32_t* words) { return launch(transpose_in_some_lanes, words); }
