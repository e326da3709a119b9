// The part of CUDA's language and runtime that the kernels use, on the CPU. See cuda_on_cpu.h.
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_on_cpu.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// The section tells the emulator where these arrays are, and the compiler refuses it for variables on the stack: an
// array declared without `static`, which every thread would have for itself, is an error.
#define __shared__ __attribute__((section("cuda_shared")))
// Code of the emulator in kernels, which the checks of races must not take for code of the kernel.
#define CUDA_ON_CPU_OWN __attribute__((no_sanitize("thread"), noinline))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = cuda_on_cpu::kWarpSize;

// --- Runtime ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CudaStream*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto call = [kernel, ... values = static_cast<Parameters>(arguments)] { kernel(values...); };
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const bool fine = cuda_on_cpu::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes,
                                        reinterpret_cast<const void*>(kernel), call);
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  const bool fine = cuda_on_cpu::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
  return fine ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// --- Barriers ---

#define SITE const cuda_on_cpu::Site& site = cuda_on_cpu::Site::current()

inline void __syncthreads(SITE) { cuda_on_cpu::barrier("__syncthreads", site, false); }
inline int __syncthreads_count(int predicate, SITE) {
  return cuda_on_cpu::barrier("__syncthreads_count", site, predicate != 0);
}
inline int __syncthreads_or(int predicate, SITE) {
  return cuda_on_cpu::barrier("__syncthreads_or", site, predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate, SITE) {
  return cuda_on_cpu::barrier("__syncthreads_and", site, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, SITE) { cuda_on_cpu::exchange("__syncwarp", site, mask, 0, true); }
inline void __threadfence_block() { cuda_on_cpu::preemption_point(); }
inline void __threadfence() { cuda_on_cpu::preemption_point(); }

// --- Warp-wide calls ---

namespace cuda_on_cpu {

template <typename T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
inline T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
CUDA_ON_CPU_OWN T shuffle(const char* name, const Site& site, unsigned mask, T value, int source) {
  const Contributions all = exchange(name, site, mask, to_bits(value));
  if (!(all.lanes >> source & 1)) fail("%s reads lane %d, which does not take part", name, source);
  return from_bits<T>(all.values[source]);
}

template <typename T, typename Combine>
CUDA_ON_CPU_OWN T reduce(const char* name, const Site& site, unsigned mask, T value, Combine combine) {
  const Contributions all = exchange(name, site, mask, to_bits(value));
  for (uint32_t others = all.lanes & ~(1u << lane()); others != 0; others &= others - 1) {
    value = combine(value, from_bits<T>(all.values[__builtin_ctz(others)]));
  }
  return value;
}

inline int first_of_segment(int width) { return lane() & ~(width - 1); }
inline int last_of_segment(int width) { return first_of_segment(width) + width - 1; }

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SITE) {
  const int from = cuda_on_cpu::first_of_segment(width) + (source & (width - 1));
  return cuda_on_cpu::shuffle("__shfl_sync", site, mask, value, from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SITE) {
  const int own = cuda_on_cpu::lane(), from = own - static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", site, mask, value,
                              from < cuda_on_cpu::first_of_segment(width) ? own : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SITE) {
  const int own = cuda_on_cpu::lane(), from = own + static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", site, mask, value,
                              from > cuda_on_cpu::last_of_segment(width) ? own : from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SITE) {
  const int own = cuda_on_cpu::lane(), from = own ^ lane_mask;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", site, mask, value,
                              from > cuda_on_cpu::last_of_segment(width) ? own : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SITE) {
  const uint64_t own = predicate ? uint64_t{1} << cuda_on_cpu::lane() : 0;
  return static_cast<unsigned>(
      cuda_on_cpu::reduce("__ballot_sync", site, mask, own, [](uint64_t a, uint64_t b) { return a | b; }));
}
inline int __any_sync(unsigned mask, int predicate, SITE) {
  return cuda_on_cpu::reduce("__any_sync", site, mask, predicate != 0, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, SITE) {
  return cuda_on_cpu::reduce("__all_sync", site, mask, predicate != 0, [](int a, int b) { return a & b; });
}
inline unsigned __activemask() { return cuda_on_cpu::unfinished_lanes(); }

template <typename T>
CUDA_ON_CPU_OWN unsigned __match_any_sync(unsigned mask, T value, SITE) {
  const uint64_t bits = cuda_on_cpu::to_bits(value);
  const cuda_on_cpu::Contributions all = cuda_on_cpu::exchange("__match_any_sync", site, mask, bits);
  unsigned same = 0;
  for (int other = 0; other < warpSize; ++other) {
    if (all.lanes >> other & 1 && all.values[other] == bits) same |= 1u << other;
  }
  return same;
}

#define WARP_REDUCTION(name, T, expression)                                          \
  inline T __reduce_##name##_sync(unsigned mask, T value, SITE) {                    \
    return cuda_on_cpu::reduce("__reduce_" #name "_sync", site, mask, value,         \
                               [](T a, T b) { return static_cast<T>(expression); }); \
  }
WARP_REDUCTION(min, unsigned, a < b ? a : b)
WARP_REDUCTION(min, int, a < b ? a : b)
WARP_REDUCTION(max, unsigned, a > b ? a : b)
WARP_REDUCTION(max, int, a > b ? a : b)
WARP_REDUCTION(add, unsigned, a + b)
WARP_REDUCTION(add, int, a + b)
WARP_REDUCTION(and, unsigned, a& b)
WARP_REDUCTION(or, unsigned, a | b)
WARP_REDUCTION(xor, unsigned, a ^ b)
#undef WARP_REDUCTION

// --- Atomics ---

namespace cuda_on_cpu {

template <typename T, typename Change>
CUDA_ON_CPU_OWN T atomic(T* address, Change change) {
  before_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace cuda_on_cpu

#define ATOMIC(name, expression)                                                     \
  template <typename T>                                                              \
  T name(T* address, std::type_identity_t<T> value) {                                \
    return cuda_on_cpu::atomic(address, [value](T old) -> T { return expression; }); \
  }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicSub, old - value)
ATOMIC(atomicExch, value)
ATOMIC(atomicMin, value < old ? value : old)
ATOMIC(atomicMax, value > old ? value : old)
ATOMIC(atomicAnd, old& value)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicXor, old ^ value)
#undef ATOMIC

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return old == compare ? value : old; });
}

// As on the GPU, each component is atomic and the vector is not.
inline float2 atomicAdd(float2* address, float2 value) {
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y)};
}
inline float4 atomicAdd(float4* address, float4 value) {
  return {atomicAdd(&address->x, value.x), atomicAdd(&address->y, value.y), atomicAdd(&address->z, value.z),
          atomicAdd(&address->w, value.w)};
}

// --- Loads, integers and arithmetic ---

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) result |= (bytes >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline float __int_as_float(int x) { return cuda_on_cpu::from_bits<float>(cuda_on_cpu::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::from_bits<int>(cuda_on_cpu::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::from_bits<unsigned>(cuda_on_cpu::to_bits(x)); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::from_bits<double>(cuda_on_cpu::to_bits(x)); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::from_bits<long long>(cuda_on_cpu::to_bits(x)); }

namespace cuda_on_cpu {

// Conversions saturate and turn NaN into 0 (the 64-bit ones into the smallest number).
template <typename I, typename F>
I to_integer(F rounded) {
  constexpr I kSmallest = sizeof(I) == 8 ? static_cast<I>(LLONG_MIN) : static_cast<I>(INT_MIN);
  constexpr F kEnd = -static_cast<F>(kSmallest);
  if (std::isnan(rounded)) return sizeof(I) == 8 ? kSmallest : 0;
  return rounded >= kEnd ? ~kSmallest : rounded < -kEnd ? kSmallest : static_cast<I>(rounded);
}

}  // namespace cuda_on_cpu

inline int __float2int_rn(float x) { return cuda_on_cpu::to_integer<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return cuda_on_cpu::to_integer<int>(std::floor(x)); }
inline int __float2int_rz(float x) { return cuda_on_cpu::to_integer<int>(std::trunc(x)); }
inline long long __float2ll_rn(float x) { return cuda_on_cpu::to_integer<long long>(std::nearbyint(x)); }
inline long long __double2ll_rn(double x) { return cuda_on_cpu::to_integer<long long>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
