// Vector code for the processor at hand, chosen at run time: one wheel has AVX-512, AVX2 and baseline code.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "host_device.h"

namespace groupdetr {

#define ALWAYS_INLINE HOST_DEVICE

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

// `kBytes / sizeof(T)` numbers on which +, -, * work lane by lane.
template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <typename V, typename T>
ALWAYS_INLINE void load(V& vector, const T* from) {
  std::memcpy(&vector, from, sizeof(V));
}

template <typename V, typename T>
ALWAYS_INLINE void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

// Bytes of the widest vector that this processor has. torch's variable ATEN_CPU_CAPABILITY may lower it.
inline int simd_bytes() {
#if defined(__x86_64__)
  static const int bytes = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view allowed = variable ? variable : "avx512";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (avx512 && allowed == "avx512") return 64;
    return avx2 && (allowed == "avx512" || allowed == "avx2") ? 32 : 16;
  }();
  return bytes;
#else
  return 16;
#endif
}

#if defined(__x86_64__)
template <class Body>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512"))) void run_avx512(
    const Body& body) {
  body.template operator()<64>();
}

template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body) {
  body.template operator()<32>();
}
#endif

// Runs `body.operator()<kBytes>()` compiled for the widest vectors of this processor. The body and all that it calls
// must be ALWAYS_INLINE: what is not inlined is compiled for the baseline.
template <class Body>
void with_simd(const Body& body) {
#if defined(__x86_64__)
  if (simd_bytes() == 64) return run_avx512(body);
  if (simd_bytes() == 32) return run_avx2(body);
#endif
  body.template operator()<16>();
}

}  // namespace groupdetr
