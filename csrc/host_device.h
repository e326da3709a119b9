// Marks functions that run on the CPU and on the GPU. Free of torch, so that headers of plain arithmetic can use it.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined, so that the code is compiled for the instruction set of the function that uses it (cpu/simd.h).
#define HOST_DEVICE inline __attribute__((always_inline))
#else
#define HOST_DEVICE inline
#endif
