// What a warp's tensor cores compute: products of small matrices of half or bfloat16 numbers, summed up in float32.
//
// Lane 4 * g + t has the part (g, t) of a matrix, in registers of two numbers, the first of them in the low bits
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; rows and columns count from 0):
//
//   a, 16 x 16     register 2 * i + j: row g + 8 * j, columns 8 * i + 2 * t and the next
//   b, 16 x 8      register i: rows 8 * i + 2 * t and the next, column g
//   sums, 16 x 8   number 2 * i + j: row g + 8 * i, column 2 * t + j
//
// Products are summed up over columns of a and rows of b, whose order does not matter if it is the same.
//
// Free of torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if !defined(__CUDACC__)
#include "tensor_cores_on_cpu.h"  // of tests/cuda_on_cpu
#endif

namespace groupdetr {

constexpr int kOldestTensorCores = 80;  // compute capability 8.0 has what follows

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kHasTensorCores = true;
#else
constexpr bool kHasTensorCores = false;
#endif

namespace {

// Two numbers, rounded, in a register.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, static_cast<const void*>(&pair), sizeof(word));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, static_cast<const void*>(&pair), sizeof(word));
  }
  return word;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &word, sizeof(word));
    return __half22float2(pair);
  } else {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
  }
}

// What can be multiplied.
template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

// Weights in float32 are multiplied by kFactor, and may be up to kLargest, where neither they nor what rounding leaves
// of them exceed the range of T.
template <typename T>
struct WeightRange {
  static constexpr float kFactor = 1, kLargest = 0x1p100f;
};
template <>
struct WeightRange<__half> {
  static constexpr float kFactor = 0x1p15f, kLargest = 1.875f;
};

// Two numbers, rounded, and what rounding leaves of them, rounded again: together as good as a float32 to 2^-16 in
// bfloat16, to 2^-21 in float16 where they are not small.
struct SplitPair {
  uint32_t rounded, rest;
};

template <typename T>
__device__ __forceinline__ SplitPair split(float low, float high) {
  const uint32_t rounded = pack<T>(low, high);
  const float2 back = unpack<T>(rounded);
  return {rounded, pack<T>(low - back.x, high - back.y)};
}

// The low numbers of two words, and the high ones.
__device__ __forceinline__ uint32_t low_numbers(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t high_numbers(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// sums += a * b
template <typename T>
__device__ __forceinline__ void add_product(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  cuda_on_cpu::add_product<T>(sums, a, b);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Transposes an 8 x 8 matrix of numbers of 16 bits, of which lane 4 * g + t has row g, columns 2 * t and the next.
__device__ __forceinline__ uint32_t transposed(uint32_t own) {
#if !defined(__CUDACC__)
  return cuda_on_cpu::transposed(own);
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(own));
  return result;
#endif
}

}  // namespace
}  // namespace groupdetr
