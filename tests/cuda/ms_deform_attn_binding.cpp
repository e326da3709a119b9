// The launchers of csrc/cuda/ms_deform_attn.cuh as C functions.

#include "cuda/ms_deform_attn.cuh"

using groupdetr::DeformProblem;
using groupdetr::SortedSample;

#define EXPORT extern "C" __attribute__((visibility("default")))

#define BIND(T, A, name)                                                                                            \
  EXPORT int forward_##name(const DeformProblem* p, const T* value, const A* locations, const A* weights, T* out) { \
    return groupdetr::launch_deform_forward(*p, value, locations, weights, out, nullptr);                           \
  }                                                                                                                 \
  EXPORT int backward_##name(const DeformProblem* p, const T* value, const A* locations, const A* weights,          \
                             const T* grad_out, A* grad_value, A* grad_locations, A* grad_weights) {                \
    return groupdetr::launch_deform_backward(*p, value, locations, weights, grad_out, grad_value, grad_locations,   \
                                             grad_weights, nullptr);                                                \
  }                                                                                                                 \
  EXPORT int backward_sorted_##name(const DeformProblem* p, const T* value, const A* locations, const A* weights,   \
                                    const T* grad_out, A* grad_value, A* grad_locations, A* grad_weights,           \
                                    int32_t* starts, int32_t* ranks, int32_t* offsets, SortedSample<A>* samples) {  \
    return groupdetr::launch_deform_backward_sorted(*p, value, locations, weights, grad_out, grad_value,            \
                                                    grad_locations, grad_weights,                                   \
                                                    {starts, ranks, offsets, samples, nullptr}, nullptr);           \
  }                                                                                                                 \
  EXPORT int grad_value_in_order_##name(const DeformProblem* p, const A* locations, const A* weights,               \
                                        const T* grad_out, T* grad_value, int32_t* starts, int32_t* ranks,          \
                                        int32_t* offsets, SortedSample<A>* samples, SortedSample<A>* ordered) {     \
    return groupdetr::launch_deform_grad_value_in_order(*p, locations, weights, grad_out, grad_value,               \
                                                        {starts, ranks, offsets, samples, ordered}, nullptr);       \
  }

BIND(float, float, float32)
#if !defined(FLOAT32_ONLY)
BIND(double, double, float64)
BIND(__half, float, float16)
BIND(__nv_bfloat16, float, bfloat16)
#endif

EXPORT int64_t offsets_size(const DeformProblem* p) { return groupdetr::offsets_size<1>(*p); }
