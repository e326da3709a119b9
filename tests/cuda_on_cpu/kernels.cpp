// Small kernels, right and wrong ones, for the tests of the emulator.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern __shared__ double dynamic_shared_memory[];

namespace {

template <typename... Parameters, typename... Arguments>
int launch(int blocks, int threads, size_t shared, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__global__ void count_threads(int* counts, bool atomic) {
  static __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (atomic) {
    atomicAdd(&count, 1);
  } else {
    count += 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

__global__ void reverse(const int* input, int* output, bool with_barrier) {
  int* buffer = reinterpret_cast<int*>(dynamic_shared_memory);
  buffer[threadIdx.x] = input[threadIdx.x];
  if (with_barrier) __syncthreads();
  output[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_calls(const int* input, int* output) {
  constexpr unsigned kAll = 0xffffffff;
  const int lane = threadIdx.x % warpSize, own = input[threadIdx.x];
  int column = 0;
  const auto put = [&](int value) { output[threadIdx.x + blockDim.x * column++] = value; };
  put(__shfl_sync(kAll, own, lane / 2));
  put(__shfl_sync(kAll, own, 9, 8));
  put(__shfl_up_sync(kAll, own, 3));
  put(__shfl_down_sync(kAll, own, 3, 16));
  put(__shfl_xor_sync(kAll, own, 5, 8));
  put(static_cast<int>(__ballot_sync(kAll, own > 0)));
  put(__any_sync(kAll, own > 90));
  put(__all_sync(kAll, own > -90));
  put(__reduce_add_sync(kAll, own));
  put(__reduce_min_sync(kAll, own));
  put(static_cast<int>(__reduce_max_sync(kAll, static_cast<unsigned>(own))));
  put(static_cast<int>(__match_any_sync(kAll, own % 3)));
  put(__syncthreads_count(own > 0));
  put(__syncthreads_or(own > 98));
  put(__syncthreads_and(own < 98));
  put(static_cast<int>(__shfl_xor_sync(kAll, 0.5 * own, 1) * 2));
  const unsigned half_warp = lane < 16 ? 0xffff : 0xffff0000;
  if (lane < 16) {
    put(__reduce_add_sync(half_warp, own));
  } else {
    put(__reduce_max_sync(half_warp, own));
  }
}

__global__ void atomics(const float* input, float* sums, unsigned long long* wide, int* words) {
  const float own = input[threadIdx.x];
  atomicAdd(sums, own);
  atomicAdd(reinterpret_cast<float4*>(sums + 4), make_float4(own, 1, 2, 3));
  atomicAdd(reinterpret_cast<double*>(sums + 8), own);
  atomicAdd(wide, 1ull << 33);
  atomicMin(words, static_cast<int>(own));
  atomicMax(words + 1, static_cast<int>(own));
  atomicExch(words + 2, 5);
  int seen = words[4];  // never written: a plain read beside atomics would be a race
  for (int expected = atomicAdd(words + 3, 0); expected != seen;) {
    seen = expected;
    expected = atomicCAS(words + 3, seen, seen + 2);
  }
}

// Nothing is wrong with this one: threads leave early, and the lanes of each half warp meet by themselves.
__global__ void leave_early(int* output) {
  const int lane = threadIdx.x % warpSize;
  if (lane % 4 == 3) return;
  __syncthreads();
  const unsigned mask = lane < 16 ? 0x7777 : 0x77770000;
  output[threadIdx.x] = __reduce_add_sync(mask, 1);
  __syncwarp(mask);
  if (lane % 16 == 0) output[threadIdx.x + 1] += 1;
}

__global__ void misuse(int which, int* memory) {
  constexpr unsigned kAll = 0xffffffff;
  static __shared__ int* pointer;
  const int thread = threadIdx.x, lane = thread % warpSize;
  if (which == 0) {
    memory[thread] = lane < 16 ? __shfl_sync(kAll, thread, 0) : __any_sync(kAll, thread);
  } else if (which == 1) {
    memory[thread] = __ballot_sync(lane < 16 ? kAll : 0xfffffff0, 1);
  } else if (which == 2) {
    if (lane < 16) memory[thread] = __shfl_sync(0xffff, thread, 20);
  } else if (which == 3) {
    if (lane < 16) memory[thread] = __any_sync(0xff, thread);
  } else if (which == 4) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (which == 5) {
    if (thread == 0) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  } else if (which == 6) {
    int own = thread;
    if (thread == 0) pointer = &own;
    __syncthreads();
    memory[thread] = *pointer;
    __syncthreads();
  } else if (which == 7) {
    memory[0] = 1;
  } else if (which == 8) {
    memory[thread] = thread;
    __any_sync(kAll, 1);  // waits for the other lanes, but does not order memory
    memory[128 + thread] = memory[thread ^ 1];
  } else if (which == 9) {
    atomicAdd(memory, 1);
    memory[1 + thread] = memory[0];
  }
}

__global__ void out_of_bounds(int which, int* memory) {
  static __shared__ int buffer[8];
  int* dynamic = reinterpret_cast<int*>(dynamic_shared_memory);
  dynamic[threadIdx.x] = buffer[threadIdx.x % 8] = 1;
  if (which == 1) memory[threadIdx.x + 1] = 1;
  if (which == 2) memory[threadIdx.x] = dynamic[threadIdx.x + 1];
  if (which == 3) memory[threadIdx.x] = buffer[threadIdx.x % 9];
}

template <typename T>
__global__ void round_trip(const float* input, float* output, int count) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index < count) output[index] = static_cast<float>(T(input[index]));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int run_count(int* counts, bool atomic, int blocks) {
  return launch(blocks, 96, 0, count_threads, counts, atomic);
}
EXPORT int run_reverse(const int* input, int* output, bool with_barrier) {
  return launch(1, 64, 64 * sizeof(int), reverse, input, output, with_barrier);
}
EXPORT int run_reverse_with_shared_memory(const int* input, int* output, size_t bytes, size_t allowed) {
  const cudaError_t error = allowed == 0 ? cudaSuccess
                                         : cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                static_cast<int>(allowed));
  return error != cudaSuccess ? error : launch(1, 64, bytes, reverse, input, output, true);
}
EXPORT int run_warp_calls(const int* input, int* output) { return launch(1, 64, 0, warp_calls, input, output); }
EXPORT int run_atomics(const float* input, float* sums, unsigned long long* wide, int* words) {
  return launch(1, 64, 0, atomics, input, sums, wide, words);
}
EXPORT int run_leave_early(int* output) { return launch(2, 64, 0, leave_early, output); }
EXPORT int run_misuse(int which, int* memory) {
  return launch(which == 7 ? 2 : 1, which == 7 ? 1 : 64, 0, misuse, which, memory);
}
EXPORT int run_out_of_bounds(int which, int* memory) {
  return launch(1, 32, 32 * sizeof(int), out_of_bounds, which, memory);
}
EXPORT int run_half(const float* input, float* output, int count) {
  return launch((count + 255) / 256, 256, 0, round_trip<__half>, input, output, count);
}
EXPORT int run_bfloat16(const float* input, float* output, int count) {
  return launch((count + 255) / 256, 256, 0, round_trip<__nv_bfloat16>, input, output, count);
}
EXPORT int run_too_many_threads(int* memory) { return launch(1, 1025, 0, misuse, 0, memory); }
