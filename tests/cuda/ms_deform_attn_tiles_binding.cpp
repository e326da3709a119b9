// The launcher of csrc/cuda/ms_deform_attn_tiles.cuh as C functions.

#include "cuda/ms_deform_attn_tiles.cuh"

using groupdetr::DeformProblem;
using groupdetr::SortedSample;

#define EXPORT extern "C" __attribute__((visibility("default")))

#define BIND(T, name)                                                                                                 \
  EXPORT int backward_tiles_##name(const DeformProblem* p, const T* value, const float* locations,                    \
                                   const float* weights, const T* grad_out, float* grad_value, float* grad_locations, \
                                   float* grad_weights, int32_t* starts, int32_t* ranks, int32_t* offsets,            \
                                   SortedSample<float>* samples) {                                                    \
    return groupdetr::launch_deform_backward_tiles(*p, value, locations, weights, grad_out, grad_value,               \
                                                   grad_locations, grad_weights,                                      \
                                                   {starts, ranks, offsets, samples, nullptr}, nullptr);              \
  }

BIND(__nv_bfloat16, bfloat16)
#if !defined(BFLOAT16_ONLY)
BIND(__half, float16)
#endif

EXPORT int64_t offsets_size(const DeformProblem* p) { return groupdetr::offsets_size<groupdetr::kTileCells>(*p); }

EXPORT int32_t divide(int32_t number, int32_t divisor) { return groupdetr::Divisor(divisor).divide(number); }
