// The backward pass of multi-scale deformable attention from sorted samples.
//
// Samples one by one take four loads of value and four sums in memory each. Here a group of lanes walks over some of
// the sorted samples, with the values of the cell at hand and the sums of their gradients in registers, and turns to
// memory where the next cell begins.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_sorting.cuh"

namespace groupdetr {
namespace {

constexpr int kRun = 64;  // sorted samples that a group walks over

// A lane's channels as they are in memory, kStep of them adjacent.
template <typename T, int kVector, int kStep>
struct LaneRow {
  T channel[kVector];

  __device__ __forceinline__ void load(const DeformGroup& group, int32_t channels, const T* row) {
    for_added<kVector, kStep>(group, 0, channels, [&](int k, int32_t first) {
      if constexpr (kStep * sizeof(T) == 16) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + first));
        memcpy(static_cast<void*>(channel + k), &raw, sizeof(raw));
      } else if constexpr (kStep * sizeof(T) == 8 && kStep > 1) {
        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(row + first));
        memcpy(static_cast<void*>(channel + k), &raw, sizeof(raw));
      } else {
        static_assert(kStep == 1);
        channel[k] = row[first];
      }
    });
  }
};

// The gradients of all samples that touch a pixel, and that of value, to which it adds. A group's lanes have all
// channels at once.
template <typename T, int kVector>
__global__ void __launch_bounds__(kDeformThreads, 4)
    deform_backward_sorted(const __grid_constant__ DeformProblem p, int32_t group_size, int64_t cells,
                           const T* __restrict__ value, const T* __restrict__ grad_out,
                           const int32_t* __restrict__ starts,
                           const SortedSample<DeformArithmetic<T>>* __restrict__ sorted,
                           DeformArithmetic<T>* __restrict__ grad_value,
                           DeformArithmetic<T>* __restrict__ grad_locations,
                           DeformArithmetic<T>* __restrict__ grad_weights) {
  using A = DeformArithmetic<T>;
  constexpr int kStep = std::is_same_v<A, float> && kVector % 4 == 0 ? 4 : 1;
  static __shared__ SharedCorners<A> corners_of_block[kDeformThreads + kDeformThreads / kMinGroup];
  static __shared__ CornerSums<A> sums_of_block[kDeformThreads];
  static __shared__ int32_t queries_of_block[kDeformThreads];
  const DeformGroup group = own_group(group_size);
  SharedCorners<A>* const corners = corners_of_group(corners_of_block, group);
  CornerSums<A>* const dots_of_group = sums_of_block + threadIdx.x - group.lane;
  int32_t* const queries = queries_of_block + threadIdx.x - group.lane;
  const int32_t row = p.heads * p.channels, samples = p.levels * p.points;
  const int64_t begin = own_item(group) * kRun, maps = static_cast<int64_t>(p.images) * p.heads;
  for (int64_t map = blockIdx.y; map < maps; map += gridDim.y) {
    const int64_t total = starts[map * (cells + 1) + cells], image = map / p.heads, head = map % p.heads;
    const T* const values_of_map = value + image * p.pixels * row + head * p.channels;
    A* const sums_of_map = grad_value + image * p.pixels * row + head * p.channels;
    const T* const grads_of_map = grad_out + image * p.queries * row + head * p.channels;
    const SortedSample<A>* const of_map = sorted + map * p.queries * samples;
    LaneRow<T, kVector, kStep> values[4] = {};
    A sums[4][kVector] = {};
    int32_t pixels[4] = {-1, -1, -1, -1};  // of the cell at hand
    const auto add_sums = [&] {
      if (pixels[0] < 0) return;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        A* const to = sums_of_map + static_cast<int64_t>(pixels[c]) * row;
        for_added<kVector, kStep>(group, 0, p.channels, [&](int k, int32_t channel) {
          if constexpr (kStep == 4 && kHasVectorAtomics) {
            add_vector(to + channel, make_float4(sums[c][k], sums[c][k + 1], sums[c][k + 2], sums[c][k + 3]));
          } else {
#pragma unroll
            for (int i = 0; i < kStep; ++i) atomicAdd(to + channel + i, sums[c][k + i]);
          }
        });
      }
    };
    for (int32_t turn = 0; turn < kRun; turn += group.size) {
      const int64_t place = begin + turn + group.lane;
      const bool exists = place < total;
      // All lanes of a warp make the same number of turns, as the calls in which they meet require.
      if (!__any_sync(kAllLanes, exists)) break;
      const SortedSample<A> own = exists ? of_map[place] : SortedSample<A>{A(-1), A(-1), A(0), 0};
      const int32_t query = own.index / samples, index = own.index % samples;
      const DeformSample<A> sample(p, index / p.points, own.x, own.y, own.attention);
      corners[group.lane] = sample.corners;
      queries[group.lane] = query;
      __syncwarp();
      for (int32_t first = 0; first < group.size; first += kMinGroup) {
        LaneRow<T, kVector, kStep> grads[kMinGroup] = {};
#pragma unroll
        for (int s = 0; s < kMinGroup; ++s) {
          if (!corners[first + s].touches_map()) continue;
          grads[s].load(group, p.channels, grads_of_map + static_cast<int64_t>(queries[first + s]) * row);
        }
#pragma unroll
        for (int s = 0; s < kMinGroup; ++s) {
          const SharedCorners<A> shared = corners[first + s];
          A dots[4] = {};
          if (shared.touches_map()) {
            if (shared.pixel[0] != pixels[0] || shared.pixel[3] != pixels[3]) {
              add_sums();
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                pixels[c] = shared.pixel[c];
                values[c].load(group, p.channels, values_of_map + static_cast<int64_t>(pixels[c]) * row);
#pragma unroll
                for (int k = 0; k < kVector; ++k) sums[c][k] = A(0);
              }
            }
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
              const A grad = wide(grads[s].channel[k]);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                dots[c] += wide(values[c].channel[k]) * grad;
                sums[c][k] += shared.weight[c] * grad;
              }
            }
          }
          const A dot = sum_over_group(dots, group);
          if (group.lane < 4) dots_of_group[first + s].corner[group.lane] = dot;
        }
      }
      __syncwarp();
      if (exists) {
        const int64_t to = ((image * p.queries + query) * p.heads + head) * samples + index;
        sample.store_gradients(dots_of_group[group.lane], grad_locations + to * 2, grad_weights + to);
      }
    }
    add_sums();
  }
}

}  // namespace

// Whether the lanes of a group have all channels at once.
template <typename T, typename... Pointers>
bool fits_sorted(const DeformProblem& p, const Pointers*... pointers) {
  const int32_t vector = vectors_fit<T>(p, pointers...) ? kVectorSize<T> : 1;
  return p.channels <= deform_group_size(p, vector) * vector;
}

// Writes the gradients of locations and weights, and adds that of value to `grad_value`, in any order. For problems
// that fits_sorted() answers for; `scratch.ordered` is not used.
template <typename T>
cudaError_t launch_deform_backward_sorted(const DeformProblem& p, const T* value, const DeformArithmetic<T>* locations,
                                          const DeformArithmetic<T>* weights, const T* grad_out,
                                          DeformArithmetic<T>* grad_value, DeformArithmetic<T>* grad_locations,
                                          DeformArithmetic<T>* grad_weights, DeformScratch<DeformArithmetic<T>> scratch,
                                          cudaStream_t stream) {
  if (!fits_sorted<T>(p, value, grad_out, grad_value)) return cudaErrorInvalidValue;
  if (maps_of(p) == 0) return cudaSuccess;
  const bool vectors = vectors_fit<T>(p, value, grad_out, grad_value);
  const int32_t group_size = deform_group_size(p, vectors ? kVectorSize<T> : 1);
  const auto kernel = vectors ? &deform_backward_sorted<T, kVectorSize<T>> : &deform_backward_sorted<T, 1>;
  const int64_t runs = (samples_of_map(p) + kRun - 1) / kRun;
  scratch.ordered = nullptr;
  return until_error(
      [&] { return launch_deform_sort(p, locations, weights, grad_locations, grad_weights, scratch, stream); },
      [&] {
        return launch_deform(kernel, runs, kDeformThreads / group_size, maps_of(p), stream, p, group_size,
                             bins_of(p).count, value, grad_out, scratch.starts, scratch.samples, grad_value,
                             grad_locations, grad_weights);
      });
}

}  // namespace groupdetr
