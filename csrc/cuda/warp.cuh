// The lanes of a warp, and their registers. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace groupdetr {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffff;  // the mask with which all lanes of a warp meet

namespace {

// The same number, in a register: without this, compilers save registers and compute it again wherever it is needed.
// Not for pointers to what is written: compilers would no longer know that they are of global memory.
template <typename Number>
__device__ __forceinline__ Number in_register(Number number) {
#if defined(__CUDACC__)
  if constexpr (sizeof(number) == 8) {
    asm volatile("" : "+l"(number));
  } else {
    asm volatile("" : "+r"(number));
  }
#endif
  return number;
}

}  // namespace
}  // namespace groupdetr
