// The launcher of csrc/cuda/ms_deform_attn_products.cuh as C functions.

#include "cuda/ms_deform_attn_products.cuh"

using groupdetr::DeformProblem;

#define EXPORT extern "C" __attribute__((visibility("default")))

#define BIND(T, name)                                                                                \
  EXPORT int forward_products_##name(const DeformProblem* p, const T* value, const float* locations, \
                                     const float* weights, T* out) {                                 \
    return groupdetr::launch_deform_forward_products(*p, value, locations, weights, out, nullptr);   \
  }

BIND(__nv_bfloat16, bfloat16)
#if !defined(BFLOAT16_ONLY)
BIND(__half, float16)
#endif
