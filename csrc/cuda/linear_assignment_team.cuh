// The threads that work on one assignment problem, and the minimum of what they hold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../linear_assignment.h"
#include "warp.cuh"

namespace groupdetr {
namespace {

constexpr uint32_t kNone = 0xffffffff;  // larger than every index

// A value as bits that compare as it does (see Ordered), and where it is.
template <typename Bits>
struct Minimum {
  Bits bits;
  uint32_t index;
};

__device__ __forceinline__ uint32_t warp_minimum(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = kWarpSize / 2; step > 0; step /= 2) value = min(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
#else
  return __reduce_min_sync(kAllLanes, value);
#endif
}

// The smallest value of the lanes; among equal ones that of the smallest index.
__device__ __forceinline__ Minimum<uint32_t> warp_minimum(Minimum<uint32_t> own) {
  const uint32_t least = warp_minimum(own.bits);
  return {least, warp_minimum(own.bits == least ? own.index : kNone)};
}

__device__ __forceinline__ Minimum<uint64_t> warp_minimum(Minimum<uint64_t> own) {
  const uint32_t high = static_cast<uint32_t>(own.bits >> 32), low = static_cast<uint32_t>(own.bits);
  const uint32_t least_high = warp_minimum(high);
  const uint32_t least_low = warp_minimum(high == least_high ? low : 0xffffffff);
  const uint32_t index = warp_minimum(high == least_high && low == least_low ? own.index : kNone);
  return {static_cast<uint64_t>(least_high) << 32 | least_low, index};
}

// The threads of a block, or its first warp: what the other threads do meanwhile is their own affair.
template <int kThreads>
class Team {
 public:
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSize = kThreads;

  __device__ __forceinline__ int rank() const { return threadIdx.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarpSize; }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ bool any(bool value) const {
    if constexpr (kWarps == 1) {
      return __any_sync(kAllLanes, value);
    } else {
      return __syncthreads_or(value);
    }
  }

  // The smallest value of the team; among equal ones that of the smallest index. Orders memory as sync() does.
  template <typename Bits>
  __device__ __forceinline__ Minimum<Bits> minimum(Minimum<Bits> own) {
    own = warp_minimum(own);
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      // Two buffers in turn: a warp that is ahead by one call cannot overwrite what another one still reads.
      static __shared__ uint64_t values[2][kWarps];
      static __shared__ uint32_t indices[2][kWarps];
      if (lane() == 0) {
        values[turn_][warp()] = own.bits;
        indices[turn_][warp()] = own.index;
      }
      __syncthreads();
      own = {static_cast<Bits>(~Bits{0}), kNone};
      if (lane() < kWarps) own = {static_cast<Bits>(values[turn_][lane()]), indices[turn_][lane()]};
      turn_ ^= 1;
      own = warp_minimum(own);
    }
    return own;
  }

 private:
  int turn_ = 0;
};

}  // namespace
}  // namespace groupdetr
