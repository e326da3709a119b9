// Multi-scale deformable attention on the GPU.
//
// A group of lanes works on one query and head. The lanes compute the corners of one sample each and share them in
// shared memory; then all of them walk over the samples. In the backward kernel the products of the four corners with
// the gradient of the result are summed over the group by shuffles, which leaves one sum per corner.
// ms_deform_attn_products.cuh has another forward pass, on tensor cores.
//
// The gradient of value is summed by atomics, one sample after another. ms_deform_attn_sorted.cuh does with fewer of
// them, ms_deform_attn_tiles.cuh too and on tensor cores, ms_deform_attn_in_order.cuh without.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_in_order.cuh"
#include "ms_deform_attn_products.cuh"
#include "ms_deform_attn_samples.cuh"
#include "ms_deform_attn_sorted.cuh"
#include "ms_deform_attn_tiles.cuh"

namespace groupdetr {
namespace {

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

}  // namespace

// False if a product of sizes is too large for the 32 bits in which the kernels have it.
inline bool is_supported(const DeformProblem& p) {
  const auto fits = [](int64_t a, int64_t b) { return a * b <= INT32_MAX - kDeformThreads * 16; };
  return fits(p.queries, p.heads) && fits(p.images, p.heads) && fits(p.heads, p.channels) && fits(p.levels, p.points) &&
         fits(static_cast<int64_t>(p.queries) * p.points, p.levels) && bins_of(p).count <= INT32_MAX - kDeformThreads;
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

// Writes the gradients of locations and weights, and adds that of value to `grad_value`, in any order, unless that is
// null.
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

}  // namespace groupdetr
