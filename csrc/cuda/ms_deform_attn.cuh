// Multi-scale deformable attention on the GPU.
//
// A group of 4 to 32 lanes works on one query and head; each lane has some of the channels, 16 bytes at a time where
// the sizes and addresses allow it. The lanes compute the corners of one sample each and share them in shared memory;
// then all of them walk over the samples. In the backward kernel the products of the four corners with the gradient of
// the result are summed over the group by shuffles, which leaves one sum per corner.
//
// The gradient of value is summed by atomics, in any order, or by a kernel of its own, in a fixed order: there a warp
// owns some pixels and looks through all samples for those that touch them.
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

struct DeformGroup {
  int32_t size, lane;
};

__device__ __forceinline__ float load_wide(const float* from) { return __ldg(from); }
__device__ __forceinline__ double load_wide(const double* from) { return __ldg(from); }
__device__ __forceinline__ float load_wide(const __half* from) { return __half2float(*from); }
__device__ __forceinline__ float load_wide(const __nv_bfloat16* from) { return __bfloat162float(*from); }
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
                                          bool exists) {
    const DeformLevel& map = p.level[level];
    width = static_cast<A>(map.width);
    height = static_cast<A>(map.height);
    const A pixel_x = exists ? to_pixels(__ldg(location), width) : A(-1);
    const A pixel_y = exists ? to_pixels(__ldg(location + 1), height) : A(-1);
    attention = exists ? __ldg(weight) : A(0);
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
    grad_location[0] = inside ? attention * width * (y.low_weight * low_slope + y.high_weight * high_slope) : A(0);
    grad_location[1] = inside ? attention * height * (y.low_slope * low + y.high_slope * high) : A(0);
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

template <typename T, int kVector>
__global__ void __launch_bounds__(kDeformThreads, 8)
    deform_forward(const __grid_constant__ DeformProblem p, int32_t group_size, const T* __restrict__ value,
                   const DeformArithmetic<T>* __restrict__ locations, const DeformArithmetic<T>* __restrict__ weights,
                   T* __restrict__ out) {
  using A = DeformArithmetic<T>;
  static __shared__ SharedCorners<A> corners_of_block[kDeformThreads + kDeformThreads / kMinGroup];
  const DeformGroup group = own_group(group_size);
  SharedCorners<A>* const corners = corners_of_group(corners_of_block, group);
  const int64_t items = static_cast<int64_t>(p.queries) * p.heads, own = own_item(group);
  const bool exists = own < items;
  const int64_t item = exists ? own : 0;
  const int32_t head = static_cast<int32_t>(item) % p.heads, row = p.heads * p.channels;
  const int32_t samples = p.levels * p.points;
  for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    const int64_t map = static_cast<int64_t>(image) * p.pixels * row + head * p.channels;
    const int64_t index = image * items + item;
    // All lanes of a warp make the same number of turns, as the calls in which they meet require.
    for (int32_t chunk = 0; chunk < p.channels; chunk += group.size * kVector) {
      const int32_t channel = chunk + group.lane * kVector;
      const bool has_channels = channel < p.channels;
      A sums[kVector] = {};
      for (int32_t first = 0; first < samples; first += group.size) {
        const OwnSample<A> own_sample(p, index, exists, first + group.lane, samples, locations, weights);
        corners[group.lane] = own_sample.sample.corners;
        __syncwarp();
        const int32_t count = min(group.size, samples - first);
#pragma unroll 2
        for (int32_t s = 0; s < count; ++s) {
          const SharedCorners<A> sample = corners[s];
          if (!sample.touches_map() || !has_channels) continue;
          A values[4][kVector];
          load_corners<kVector>(value, map + channel, row, sample, values);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) sums[k] += sample.weight[c] * values[c][k];
          }
        }
        __syncwarp();
      }
      if (exists && has_channels) store_channels<kVector>(out + index * p.channels + channel, sums);
    }
  }
}

// Adds to grad_value unless it is null.
template <typename T, int kVector>
__global__ void __launch_bounds__(kDeformThreads, 4)
    deform_backward(const __grid_constant__ DeformProblem p, int32_t group_size, const T* __restrict__ value,
                    const DeformArithmetic<T>* __restrict__ locations, const DeformArithmetic<T>* __restrict__ weights,
                    const T* __restrict__ grad_out, DeformArithmetic<T>* __restrict__ grad_value,
                    DeformArithmetic<T>* __restrict__ grad_locations, DeformArithmetic<T>* __restrict__ grad_weights) {
  using A = DeformArithmetic<T>;
  static __shared__ SharedCorners<A> corners_of_block[kDeformThreads + kDeformThreads / kMinGroup];
  static __shared__ CornerSums<A> sums_of_block[kDeformThreads];
  const DeformGroup group = own_group(group_size);
  SharedCorners<A>* const corners = corners_of_group(corners_of_block, group);
  CornerSums<A>* const sums = sums_of_block + threadIdx.x - group.lane;
  const int64_t items = static_cast<int64_t>(p.queries) * p.heads, own = own_item(group);
  const bool exists = own < items;
  const int64_t item = exists ? own : 0;
  const int32_t head = static_cast<int32_t>(item) % p.heads, row = p.heads * p.channels;
  const int32_t samples = p.levels * p.points;
  const bool one_chunk = p.channels <= group.size * kVector;
  const int32_t first_channel = group.lane * kVector;
  for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    const int64_t map = static_cast<int64_t>(image) * p.pixels * row + head * p.channels;
    const int64_t index = image * items + item;
    const T* const grad = grad_out + index * p.channels;
    A grads[kVector] = {}, added[kVector] = {};
    if (first_channel < p.channels) load_channels<kVector>(grad + first_channel, grads);
    load_added<kVector>(group, 0, p.channels, grad, added);
    for (int32_t first = 0; first < samples; first += group.size) {
      const OwnSample<A> own_sample(p, index, exists, first + group.lane, samples, locations, weights);
      corners[group.lane] = own_sample.sample.corners;
      __syncwarp();
      const int32_t count = min(group.size, samples - first);
      for (int32_t s = 0; s < count; ++s) {
        const SharedCorners<A> sample = corners[s];
        A dots[4] = {};
        if (sample.touches_map()) {
#pragma unroll 1
          for (int32_t chunk = 0; chunk < p.channels; chunk += group.size * kVector) {
            const int32_t channel = chunk + first_channel;
            const bool loads = channel < p.channels;
            if (!one_chunk) {
              if (loads) load_channels<kVector>(grad + channel, grads);
              load_added<kVector>(group, chunk, p.channels, grad, added);
            }
            if (loads) {
              A values[4][kVector];
              load_corners<kVector>(value, map + channel, row, sample, values);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int k = 0; k < kVector; ++k) dots[c] += values[c][k] * grads[k];
              }
            }
            if (grad_value != nullptr) {
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                if (sample.weight[c] == A(0)) continue;  // as corners outside the map have
                A* const pixel = grad_value + map + static_cast<int64_t>(sample.pixel[c]) * row;
                add_channels<kVector>(group, chunk, p.channels, pixel, sample.weight[c], added);
              }
            }
          }
        }
        const A sum = sum_over_group(dots, group);
        if (group.lane < 4) sums[s].corner[group.lane] = sum;
      }
      __syncwarp();
      if (own_sample.exists) {
        const int64_t place = own_sample.place;
        own_sample.sample.store_gradients(sums[group.lane], grad_locations + place * 2, grad_weights + place);
      }
    }
  }
}

// The gradient of value in a fixed order of additions: by query, then point, then corner. A warp owns some consecutive
// pixels of an image and head, and a lane one channel at a time.
template <typename T>
__global__ void __launch_bounds__(kDeformThreads, 6)
    deform_grad_value_in_order(const __grid_constant__ DeformProblem p,
                               const DeformArithmetic<T>* __restrict__ locations,
                               const DeformArithmetic<T>* __restrict__ weights, const T* __restrict__ grad_out,
                               T* __restrict__ grad_value) {
  using A = DeformArithmetic<T>;
  constexpr int32_t kWarps = kDeformThreads / kWarpSize, kTile = 256 / sizeof(A);
  static __shared__ SharedCorners<A> corners_of_block[kWarps][kWarpSize];
  static __shared__ A sums_of_block[kWarps][kTile][kWarpSize];
  const int32_t warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  SharedCorners<A>* const corners = corners_of_block[warp];
  A(*const sums)[kWarpSize] = sums_of_block[warp];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kTile;
  const int64_t end = min(begin + kTile, static_cast<int64_t>(p.pixels));
  const int32_t maps = p.images * p.heads;
  for (int32_t map = blockIdx.y; map < maps; map += gridDim.y) {
    const int64_t image = map / p.heads, head = map % p.heads;
    for (int32_t chunk = 0; chunk < p.channels; chunk += kWarpSize) {
      const bool has_channel = chunk + lane < p.channels;
      for (int32_t pixel = 0; pixel < kTile; ++pixel) sums[pixel][lane] = A(0);
      for (int32_t level = 0; level < p.levels; ++level) {
        const DeformLevel& size = p.level[level];
        if (end <= size.start || begin >= size.start + static_cast<int64_t>(size.height) * size.width) continue;
        const int32_t samples = p.queries * p.points;
        for (int32_t first = 0; first < samples; first += kWarpSize) {
          const bool exists = first + lane < samples;
          const int32_t query = exists ? (first + lane) / p.points : 0;
          const int32_t point = exists ? (first + lane) % p.points : 0;
          const int64_t place = (((image * p.queries + query) * p.heads + head) * p.levels + level) * p.points + point;
          const SharedCorners<A> own =
              DeformSample<A>(p, level, locations + place * 2, weights + place, exists).corners;
          bool touches_tile = false;
          for (int c = 0; c < 4; ++c) {
            touches_tile |= own.touches_map() && own.pixel[c] >= begin && own.pixel[c] < end;
          }
          uint32_t hits = __ballot_sync(kAllLanes, touches_tile);
          if (hits == 0) continue;
          corners[lane] = own;
          __syncwarp();
          for (; hits != 0; hits &= hits - 1) {
            const int32_t hit = __ffs(static_cast<int>(hits)) - 1;
            const int32_t hit_query = (first + hit) / p.points;
            const int64_t from = ((image * p.queries + hit_query) * p.heads + head) * p.channels + chunk + lane;
            const A grad = has_channel ? load_wide(grad_out + from) : A(0);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const A weight = corners[hit].weight[c];
              const int32_t pixel = corners[hit].pixel[c];
              if (pixel >= begin && pixel < end && weight != A(0)) sums[pixel - begin][lane] += weight * grad;
            }
          }
          __syncwarp();
        }
      }
      for (int64_t pixel = begin; pixel < end && has_channel; ++pixel) {
        store_narrow(grad_value + ((image * p.pixels + pixel) * p.heads + head) * p.channels + chunk + lane,
                     sums[pixel - begin][lane]);
      }
    }
  }
}

template <typename T, typename... Pointers>
bool vectors_fit(const DeformProblem& p, const Pointers*... pointers) {
  return p.channels % kVectorSize<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int32_t deform_group_size(const DeformProblem& p, int32_t vector_size) {
  int32_t size = kMinGroup;
  while (size < kWarpSize && size * vector_size < p.channels) size *= 2;
  return size;
}

// Blocks for `items`, times `repeats` in the grid's other dimension.
template <typename Kernel, typename... Arguments>
cudaError_t launch_deform(const Kernel& kernel, int64_t items, int32_t items_per_block, int32_t repeats,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (items == 0 || repeats == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  config.gridDim = dim3(static_cast<unsigned>(blocks), repeats < kMaxGridY ? repeats : kMaxGridY);
  config.blockDim = dim3(kDeformThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

// False if a product of sizes is too large for the 32 bits in which the kernels have it.
inline bool is_supported(const DeformProblem& p) {
  const auto fits = [](int64_t a, int64_t b) { return a * b <= INT32_MAX - kDeformThreads * 16; };
  return fits(p.queries, p.heads) && fits(p.images, p.heads) && fits(p.heads, p.channels) && fits(p.levels, p.points) &&
         fits(p.queries, p.points);
}

template <typename T>
cudaError_t launch_deform_forward(const DeformProblem& p, const T* value, const DeformArithmetic<T>* locations,
                                  const DeformArithmetic<T>* weights, T* out, cudaStream_t stream) {
  const bool vectors = vectors_fit<T>(p, value, out);
  const int32_t group_size = deform_group_size(p, vectors ? kVectorSize<T> : 1);
  const auto kernel = vectors ? &deform_forward<T, kVectorSize<T>> : &deform_forward<T, 1>;
  return launch_deform(kernel, static_cast<int64_t>(p.queries) * p.heads, kDeformThreads / group_size, p.images, stream,
                       p, group_size, value, locations, weights, out);
}

// Writes the gradients of locations and weights, and adds that of value to `grad_value`, unless that is null.
template <typename T>
cudaError_t launch_deform_backward(const DeformProblem& p, const T* value, const DeformArithmetic<T>* locations,
                                   const DeformArithmetic<T>* weights, const T* grad_out,
                                   DeformArithmetic<T>* grad_value, DeformArithmetic<T>* grad_locations,
                                   DeformArithmetic<T>* grad_weights, cudaStream_t stream) {
  const bool vectors = vectors_fit<T>(p, value, grad_out, grad_value);
  const int32_t group_size = deform_group_size(p, vectors ? kVectorSize<T> : 1);
  const auto kernel = vectors ? &deform_backward<T, kVectorSize<T>> : &deform_backward<T, 1>;
  return launch_deform(kernel, static_cast<int64_t>(p.queries) * p.heads, kDeformThreads / group_size, p.images, stream,
                       p, group_size, value, locations, weights, grad_out, grad_value, grad_locations, grad_weights);
}

// Writes the gradient of value, bit by bit the same in every run.
template <typename T>
cudaError_t launch_deform_grad_value_in_order(const DeformProblem& p, const DeformArithmetic<T>* locations,
                                              const DeformArithmetic<T>* weights, const T* grad_out, T* grad_value,
                                              cudaStream_t stream) {
  constexpr int32_t kPixels = kDeformThreads / kWarpSize * (256 / sizeof(DeformArithmetic<T>));
  return launch_deform(&deform_grad_value_in_order<T>, p.pixels, kPixels, p.images * p.heads, stream, p, locations,
                       weights, grad_out, grad_value);
}

}  // namespace groupdetr
