// What the kernels of multi-scale deformable attention share: sizes, groups of lanes, channels and samples.
//
// A group of 4 to 32 lanes works on one query and head, or on one sample; each lane has some of the channels, 16 bytes
// at a time where the sizes and addresses allow it.
//
// Free of torch: pointers and sizes only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../ms_deform_attn.h"
#include "warp.cuh"

namespace groupdetr {

constexpr int kMaxDeformLevels = 16;

struct DeformLevel {
  int32_t height, width, start;  // start: the level's first pixel
};

// Value is [images, pixels, heads, channels]; locations are [images, queries, heads, levels, points, 2], weights the
// same without the 2, and results are [images, queries, heads, channels]. All are contiguous; any may be empty.
struct DeformProblem {
  int32_t images, pixels, heads, channels, queries, levels, points;
  DeformLevel level[kMaxDeformLevels];
};

// What sums, locations and weights are in.
template <typename T>
using DeformArithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace {

constexpr int kDeformThreads = 128;
constexpr int kMinGroup = 4;
constexpr int kMaxGridY = 65535;

template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);

// Divides numbers below 2^31 by one that the host knows, without a division: by a multiplication with 2^(31 + shift)
// over the divisor, rounded up, where 2^shift is at least the divisor, and the error therefore too small to matter.
struct Divisor {
  uint32_t factor;
  int32_t shift;

  explicit Divisor(int32_t divisor) : factor(0), shift(0) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }

  __device__ __forceinline__ int32_t divide(int32_t number) const {
    return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(number), factor) >> shift);
  }
};

struct DeformGroup {
  int32_t size, lane;
};

__device__ __forceinline__ float wide(float value) { return value; }
__device__ __forceinline__ double wide(double value) { return value; }
__device__ __forceinline__ float wide(__half value) { return __half2float(value); }
__device__ __forceinline__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float load_wide(const float* from) { return __ldg(from); }
__device__ __forceinline__ double load_wide(const double* from) { return __ldg(from); }
template <typename T>
__device__ __forceinline__ float load_wide(const T* from) {
  return wide(*from);
}
__device__ __forceinline__ void store_narrow(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_narrow(double* to, double value) { *to = value; }
__device__ __forceinline__ void store_narrow(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store_narrow(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

__device__ __forceinline__ void widen(const float (&from)[4], float (&to)[4]) { memcpy(to, from, 16); }
__device__ __forceinline__ void widen(const double (&from)[2], double (&to)[2]) { memcpy(to, from, 16); }
__device__ __forceinline__ void widen(const __half (&from)[8], float (&to)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) to[k] = __half2float(from[k]);
}
__device__ __forceinline__ void widen(const __nv_bfloat16 (&from)[8], float (&to)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) to[k] = __bfloat162float(from[k]);
}

// kVector is 1 or the number of T in 16 bytes.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void load_channels(const T* from, A (&to)[kVector]) {
  if constexpr (kVector == 1) {
    to[0] = load_wide(from);
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    T values[kVector];
    memcpy(static_cast<void*>(values), &raw, sizeof(raw));
    widen(values, to);
  }
}

template <int kVector, typename T, typename A>
__device__ __forceinline__ void store_channels(T* to, const A (&from)[kVector]) {
  if constexpr (kVector == 1) {
    store_narrow(to, from[0]);
  } else {
    T values[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) store_narrow(&values[k], from[k]);
    uint4 raw;
    memcpy(&raw, static_cast<const void*>(values), sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasVectorAtomics = true;
__device__ __forceinline__ void add_vector(float* to, float4 values) {
  atomicAdd(reinterpret_cast<float4*>(to), values);
}
#else
constexpr bool kHasVectorAtomics = false;
__device__ __forceinline__ void add_vector(float*, float4) {}
#endif

// Channels that a lane adds at once. They are not those that it loads: here the lanes of a group take turns every
// kAdded channels, so that together they write adjacent addresses. Of 8 half channels in a row, the sums of one lane
// fill half a sector of the second cache at a time, and twice as many sectors are touched.
template <int kVector, typename A>
constexpr int kAdded = kHasVectorAtomics && std::is_same_v<A, float> && kVector % 4 == 0 ? 4 : 1;

// Calls run(k, channel) for the channels from `chunk` on that a lane adds; k counts those of the lane.
template <int kVector, int kStep, typename Run>
__device__ __forceinline__ void for_added(const DeformGroup& group, int32_t chunk, int32_t channels, const Run& run) {
#pragma unroll
  for (int k = 0; k < kVector; k += kStep) {
    const int32_t channel = chunk + k * group.size + group.lane * kStep;
    if (channel < channels) run(k, channel);
  }
}

template <int kVector, typename T, typename A>
__device__ __forceinline__ void load_added(const DeformGroup& group, int32_t chunk, int32_t channels, const T* from,
                                           A (&to)[kVector]) {
  for_added<kVector, kAdded<kVector, A>>(group, chunk, channels, [&](int k, int32_t channel) {
#pragma unroll
    for (int i = 0; i < kAdded<kVector, A>; ++i) to[k + i] = load_wide(from + channel + i);
  });
}

template <int kVector, typename A>
__device__ __forceinline__ void add_channels(const DeformGroup& group, int32_t chunk, int32_t channels, A* to, A weight,
                                             const A (&added)[kVector]) {
  for_added<kVector, kAdded<kVector, A>>(group, chunk, channels, [&](int k, int32_t channel) {
    if constexpr (kAdded<kVector, A> == 4) {
      add_vector(to + channel,
                 make_float4(weight * added[k], weight * added[k + 1], weight * added[k + 2], weight * added[k + 3]));
    } else {
      atomicAdd(to + channel, weight * added[k]);
    }
  });
}

// What the lanes of a group share about a sample. Corner 2 * i + j is (y[i], x[j]) of ms_deform_attn.h, with 0 for low
// and 1 for high. A sample that touches no pixel has -1 as its first pixel.
template <typename A>
struct alignas(16) SharedCorners {
  int32_t pixel[4];
  A weight[4];  // with the attention weight in it

  __device__ __forceinline__ bool touches_map() const { return pixel[0] >= 0; }
};

// The sums of the products of the four corners of a sample.
template <typename A>
struct alignas(16) CornerSums {
  A corner[4];
};

// A sample as the lane knows it that computed it.
template <typename A>
struct DeformSample {
  AxisCorners<A> x, y;
  A width, height, attention;
  SharedCorners<A> corners;

  // A sample that does not exist touches no pixel and is not read.
  __device__ __forceinline__ DeformSample(const DeformProblem& p, int32_t level, const A* location, const A* weight,
                                          bool exists)
      : DeformSample(p, level, exists ? to_pixels(__ldg(location), static_cast<A>(p.level[level].width)) : A(-1),
                     exists ? to_pixels(__ldg(location + 1), static_cast<A>(p.level[level].height)) : A(-1),
                     exists ? __ldg(weight) : A(0)) {}

  // One that lies at these pixels.
  __device__ __forceinline__ DeformSample(const DeformProblem& p, int32_t level, A pixel_x, A pixel_y, A attention)
      : attention(attention) {
    const DeformLevel& map = p.level[level];
    width = static_cast<A>(map.width);
    height = static_cast<A>(map.height);
    const bool inside = is_inside(pixel_x, pixel_y, width, height);
    x = axis_corners(inside ? pixel_x : A(0), map.width);
    y = axis_corners(inside ? pixel_y : A(0), map.height);
    const int32_t low_row = map.start + y.low * map.width, high_row = map.start + y.high * map.width;
    corners.pixel[0] = inside ? low_row + x.low : -1;
    corners.pixel[1] = low_row + x.high;
    corners.pixel[2] = high_row + x.low;
    corners.pixel[3] = high_row + x.high;
    corners.weight[0] = inside ? attention * y.low_weight * x.low_weight : A(0);
    corners.weight[1] = inside ? attention * y.low_weight * x.high_weight : A(0);
    corners.weight[2] = inside ? attention * y.high_weight * x.low_weight : A(0);
    corners.weight[3] = inside ? attention * y.high_weight * x.high_weight : A(0);
  }

  // From the sums, over channels, of each corner's value times the gradient of the result.
  __device__ __forceinline__ void store_gradients(const CornerSums<A>& sums, A* grad_location, A* grad_weight) const {
    const A(&dot)[4] = sums.corner;
    const A low = x.low_weight * dot[0] + x.high_weight * dot[1];
    const A high = x.low_weight * dot[2] + x.high_weight * dot[3];
    const A low_slope = x.low_slope * dot[0] + x.high_slope * dot[1];
    const A high_slope = x.low_slope * dot[2] + x.high_slope * dot[3];
    const bool inside = corners.touches_map();
    *grad_weight = inside ? y.low_weight * low + y.high_weight * high : A(0);
    struct alignas(2 * sizeof(A)) Location {
      A x, y;
    };
    *reinterpret_cast<Location*>(grad_location) = {
        inside ? attention * width * (y.low_weight * low_slope + y.high_weight * high_slope) : A(0),
        inside ? attention * height * (y.low_slope * low + y.high_slope * high) : A(0)};
  }
};

// Sums four numbers over the lanes of a group; lane k of the group, modulo 4, gets sum k.
template <typename A>
__device__ __forceinline__ A sum_over_group(const A (&own)[4], const DeformGroup& group) {
  const bool odd = group.lane & 1, upper = group.lane & 2;
  A low = odd ? own[1] : own[0], high = odd ? own[3] : own[2];
  low += __shfl_xor_sync(kAllLanes, odd ? own[0] : own[1], 1);
  high += __shfl_xor_sync(kAllLanes, odd ? own[2] : own[3], 1);
  A sum = upper ? high : low;
  sum += __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
  for (int32_t step = kMinGroup; step < group.size; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

__device__ __forceinline__ DeformGroup own_group(int32_t size) {
  return {size, static_cast<int32_t>(threadIdx.x) & (size - 1)};
}

// A group's part of the block's corners. One is left out between two groups: the corners of two groups of 4 would else
// lie in the same banks, and be read one after another.
template <typename A>
__device__ __forceinline__ SharedCorners<A>* corners_of_group(SharedCorners<A>* of_block, const DeformGroup& group) {
  return of_block + threadIdx.x - group.lane + threadIdx.x / group.size;
}

// The index of a group's query and head within an image.
__device__ __forceinline__ int64_t own_item(const DeformGroup& group) {
  return static_cast<int64_t>(blockIdx.x) * (kDeformThreads / group.size) + threadIdx.x / group.size;
}

// The sample that a lane computes for its group.
template <typename A>
struct OwnSample {
  bool exists;
  int64_t place;  // among all samples of the problem
  DeformSample<A> sample;

  // `item` is the group's query and head among those of all images; `index` is the sample among their `count`.
  __device__ __forceinline__ OwnSample(const DeformProblem& p, int64_t item, bool item_exists, int32_t index,
                                       int32_t count, const A* locations, const A* weights)
      : exists(item_exists && index < count),
        place(item * count + index),
        sample(p, exists ? index / p.points : 0, locations + place * 2, weights + place, exists) {}
};

// Loads a lane's channels of the four corners of a sample. `map` is where the lane's channels of the image's first
// pixel are, `row` the distance between pixels.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void load_corners(const T* value, int64_t map, int32_t row, const SharedCorners<A>& sample,
                                             A (&values)[4][kVector]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    load_channels<kVector>(value + map + static_cast<int64_t>(sample.pixel[c]) * row, values[c]);
  }
}

template <typename T, typename... Pointers>
bool vectors_fit(const DeformProblem& p, const Pointers*... pointers) {
  return p.channels % kVectorSize<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The smallest group with so many lanes, if there are such.
inline int32_t group_for(int64_t lanes) {
  int32_t size = kMinGroup;
  while (size < kWarpSize && size < lanes) size *= 2;
  return size;
}

inline int32_t deform_group_size(const DeformProblem& p, int32_t vector_size) {
  return group_for((static_cast<int64_t>(p.channels) + vector_size - 1) / vector_size);
}

// Blocks for `items`, times `repeats` in the grid's other dimension.
template <int kThreads = kDeformThreads, typename Kernel, typename... Arguments>
cudaError_t launch_deform(const Kernel& kernel, int64_t items, int32_t items_per_block, int64_t repeats,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (items == 0 || repeats == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  config.gridDim =
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(repeats < kMaxGridY ? repeats : kMaxGridY));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
}  // namespace groupdetr
