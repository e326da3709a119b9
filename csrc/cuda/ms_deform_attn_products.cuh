// The forward pass of multi-scale deformable attention on tensor cores, for half and bfloat16.
//
// A result is the sum of rows of value, weighted: the four corners of every sample. A warp works on two heads of a
// query, four of their samples at a time, and computes one product of matrices for each pair of channels in 16 bytes:
//
//   sums, 16 x 8   =   values, 16 x 16   *   weights, 16 x 8
//
// Lane 4 * g + t has four corners of sample t of head g / 4, of each the 16 bytes of channels that are number g % 4
// among those of the head. These are row g of values, the first channel of the pair, and row g + 8, the second; columns
// are the corners of the four samples. Rows of the first head want its weights, rows of the second head those of the
// second: columns 0 and 4 of weights, which are rounded to the type of value, and columns 1 and 5, which have what
// rounding leaves. Each lane has what its own column needs, and of the sums it needs two that lie side by side in the
// lane that writes the result; nothing is exchanged but the weights, in shared memory.
//
// Nothing reads the other sums. With weights beyond the range of the type a warp does without tensor cores. A value
// that is not finite may make a result NaN that would be infinite.
//
// Free of torch: pointers and sizes only.
#pragma once

#include "ms_deform_attn_samples.cuh"
#include "tensor_cores.cuh"

namespace groupdetr {
namespace {

constexpr int kHeadsOfWarp = 2;
constexpr int kStagedSamples = kWarpSize / kHeadsOfWarp;  // of a head; each lane computes one
constexpr int kSamplesOfProduct = 4;
constexpr int kProductWarps = kDeformThreads / kWarpSize;
constexpr int kVectorsOfPass = 4;   // 16 bytes each: the channels that four rows of lanes have of a head
constexpr int kProductsAtOnce = 2;  // whose values are loaded before the first of them is computed

constexpr uint32_t kNoPlace = 0xffffffff;

// What axis_corners() has of a position in (-1, size), but for slopes, in fewer instructions.
struct AxisPlaces {
  int32_t low, high;
  float low_weight, high_weight;

  __device__ __forceinline__ AxisPlaces(float position, int32_t size) {
    const int32_t whole = __float2int_rd(position);
    const float fraction = position - static_cast<float>(whole);
    low = max(whole, 0);
    high = min(whole + 1, size - 1);
    low_weight = whole >= 0 ? 1 - fraction : 0.f;
    high_weight = whole + 1 < size ? fraction : 0.f;
  }
};

// What a warp shares of its samples.
struct StagedCorners {
  uint4 places[kWarpSize];   // of the corners' rows in their map, in units of 16 bytes; kNoPlace if it touches no pixel
  uint4 weights[kWarpSize];  // rounded, of corners 0 and 1, 2 and 3; what rounding leaves of them. Or four floats

  // Stages sample `index` of a query and head, which is at `place` among all, as that of the lane; it touches no pixel
  // unless it exists. Returns whether weights are staged as floats. All lanes must call it.
  template <typename T>
  __device__ __forceinline__ bool stage(const DeformProblem& p, const Divisor& points, int32_t index, int64_t place,
                                        bool exists, const float* locations, const float* attention_weights) {
    const DeformLevel& map = p.level[exists ? points.divide(index) : 0];
    const float width = static_cast<float>(map.width), height = static_cast<float>(map.height);
    const float x = exists ? to_pixels(__ldg(locations + place * 2), width) : -1.f;
    const float y = exists ? to_pixels(__ldg(locations + place * 2 + 1), height) : -1.f;
    const float factor = exists ? __ldg(attention_weights + place) : 0.f;
    const bool inside = is_inside(x, y, width, height);
    const AxisPlaces columns(inside ? x : 0.f, map.width), rows(inside ? y : 0.f, map.height);
    const float attention = inside ? factor : 0.f;
    const bool in_floats = __any_sync(kAllLanes, !(fabsf(attention) <= WeightRange<T>::kLargest));
    const float above = attention * rows.low_weight, below = attention * rows.high_weight;
    const float weight[4] = {above * columns.low_weight, above * columns.high_weight, below * columns.low_weight,
                             below * columns.high_weight};
    const uint32_t vectors = p.heads * p.channels / kVectorSize<T>;
    const uint32_t low_row = (map.start + rows.low * map.width) * vectors;
    const uint32_t high_row = (map.start + rows.high * map.width) * vectors;
    const uint32_t low_column = columns.low * vectors, high_column = columns.high * vectors;
    const int32_t lane = threadIdx.x % kWarpSize;
    places[lane] = make_uint4(inside ? low_row + low_column : kNoPlace, low_row + high_column, high_row + low_column,
                              high_row + high_column);
    if (in_floats) {
      weights[lane] = make_uint4(__float_as_uint(weight[0]), __float_as_uint(weight[1]), __float_as_uint(weight[2]),
                                 __float_as_uint(weight[3]));
    } else {
      constexpr float kFactor = WeightRange<T>::kFactor;
      const SplitPair upper = split<T>(weight[0] * kFactor, weight[1] * kFactor);
      const SplitPair lower = split<T>(weight[2] * kFactor, weight[3] * kFactor);
      weights[lane] = make_uint4(upper.rounded, lower.rounded, upper.rest, lower.rest);
    }
    return in_floats;
  }

  // The weights of a sample in an even or an odd column.
  __device__ __forceinline__ uint2 weights_of_column(int32_t sample, int32_t column) const {
    return reinterpret_cast<const uint2*>(weights + sample)[column % 2];
  }
};
// A lane's 16 bytes of the four corners of a sample. `from` is where they are in the first row of the map.
template <typename T>
struct CornerWords {
  uint32_t word[4][4] = {};

  __device__ __forceinline__ CornerWords(const T* from, const uint4& places, bool has_channels) {
    if (places.x == kNoPlace || !has_channels) return;
    const uint32_t place[4] = {places.x, places.y, places.z, places.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from) + place[c]);
      memcpy(word[c], &raw, sizeof(raw));
    }
  }

  // Adds the products of the lanes' channels with the lanes' weights.
  __device__ __forceinline__ void add_to(float (&sums)[4][4], const uint2& weights) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      add_product<T>(sums[k],
                     {low_numbers(word[0][k], word[1][k]), high_numbers(word[0][k], word[1][k]),
                      low_numbers(word[2][k], word[3][k]), high_numbers(word[2][k], word[3][k])},
                     {weights.x, weights.y});
    }
  }
};

// Adds up the staged samples of the lane's head, from `first` on, in `count` products. All lanes must call it.
template <typename T>
__device__ __forceinline__ void add_products(const T* from, const StagedCorners& staged, int32_t first, int32_t count,
                                             bool has_channels, int32_t column, float (&sums)[4][4]) {
#pragma unroll 1
  for (int32_t product = 0; product < count; product += kProductsAtOnce) {
    const int32_t place = first + product * kSamplesOfProduct, next = place + kSamplesOfProduct;
    const CornerWords<T> corners(from, staged.places[place], has_channels);
    const CornerWords<T> others(from, staged.places[next], has_channels);
    corners.add_to(sums, staged.weights_of_column(place, column));
    others.add_to(sums, staged.weights_of_column(next, column));
  }
}

// The same without tensor cores, `factor` times.
template <typename T>
__device__ __forceinline__ void add_in_floats(const T* from, const StagedCorners& staged, int32_t first, int32_t count,
                                              bool has_channels, float factor, float (&sums)[4][4]) {
  float own[8] = {};
#pragma unroll 1
  for (int32_t product = 0; product < count; ++product) {
    const int32_t place = first + product * kSamplesOfProduct;
    const CornerWords<T> corners(from, staged.places[place], has_channels);
    const uint4 bits = staged.weights[place];
    const float weights[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                              __uint_as_float(bits.w)};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 values = unpack<T>(corners.word[c][k]);
        own[2 * k] += weights[c] * values.x;
        own[2 * k + 1] += weights[c] * values.y;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    own[k] += __shfl_xor_sync(kAllLanes, own[k], 1);
    own[k] += __shfl_xor_sync(kAllLanes, own[k], 2);
    sums[k / 2][2 * (k % 2)] += own[k] * factor;
  }
}

// Block (x, y) has images y, y + gridDim.y, ... and of their queries `turns` for each of its warps, side by side, so
// that what one query reads is in the first cache for the next; x counts pairs of heads fastest.
template <typename T>
__global__ void __launch_bounds__(kDeformThreads, 5)
    deform_forward_products(const __grid_constant__ DeformProblem p, const __grid_constant__ Divisor points,
                            int32_t turns, const T* __restrict__ value, const float* __restrict__ locations,
                            const float* __restrict__ weights, T* __restrict__ out) {
  if constexpr (kHasTensorCores) {
    constexpr float kFactor = WeightRange<T>::kFactor;
    static __shared__ StagedCorners staged_of_block[kProductWarps];
    StagedCorners& staged = staged_of_block[threadIdx.x / kWarpSize];
    const int32_t lane = threadIdx.x % kWarpSize, group = lane / 4, column = lane % 4;
    const int32_t pairs = (p.heads + 1) / kHeadsOfWarp, row = p.heads * p.channels, samples = p.levels * p.points;
    const int32_t run = static_cast<int32_t>(blockIdx.x) / pairs;
    const int32_t first_head = (static_cast<int32_t>(blockIdx.x) - run * pairs) * kHeadsOfWarp;
    const int32_t first_query = run * turns * kProductWarps + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    const int32_t end = min(p.queries, first_query + turns * kProductWarps);
    // The head and the sample that the lane computes, and the head whose channels it has.
    const int32_t own_head = first_head + lane / kStagedSamples, own_index = lane % kStagedSamples;
    const int32_t head = first_head + group / 4, vector = group % 4, own_channel = vector * kVectorSize<T>;
    const int32_t first_staged = group / 4 * kStagedSamples + column;
    for (int32_t image = blockIdx.y; image < p.images; image += gridDim.y) {
      const T* const map =
          in_register(value + static_cast<int64_t>(image) * p.pixels * row + head * p.channels + own_channel);
      const int64_t item = (static_cast<int64_t>(image) * p.queries + first_query) * p.heads;
      int64_t place = (item + own_head) * samples + own_index;
      T* to = out + (item + head) * p.channels + own_channel;
      for (int32_t query = first_query; query < end; query += kProductWarps) {
        for (int32_t pass = 0; pass < p.channels; pass += kVectorsOfPass * kVectorSize<T>) {
          const bool has_channels = head < p.heads && pass + own_channel < p.channels;
          float sums[4][4] = {};
          for (int32_t first = 0; first < samples; first += kStagedSamples) {
            const bool exists = own_head < p.heads && first + own_index < samples;
            const bool in_floats =
                staged.stage<T>(p, points, first + own_index, place + first, exists, locations, weights);
            __syncwarp();
            const int32_t products = (min(kStagedSamples, samples - first) + kSamplesOfProduct - 1) / kSamplesOfProduct;
            const T* const from = map + pass;
            if (in_floats) {
              add_in_floats(from, staged, first_staged, products, has_channels, kFactor, sums);
            } else {
              add_products(from, staged, first_staged, products, has_channels, vector, sums);
            }
            __syncwarp();
          }
          // The first head's sums are in columns 0 and 1, which lanes with column 0 have, the second one's in 4 and 5.
          if (has_channels && column == group / 4 * 2) {
            float results[kVectorSize<T>];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              results[2 * k] = (sums[k][0] + sums[k][1]) * (1 / kFactor);
              results[2 * k + 1] = (sums[k][2] + sums[k][3]) * (1 / kFactor);
            }
            store_channels<kVectorSize<T>>(to + pass, results);
          }
        }
        place += static_cast<int64_t>(kProductWarps * p.heads) * samples;
        to += static_cast<int64_t>(kProductWarps) * row;
      }
    }
  }
}

}  // namespace

// Whether deform_forward_products serves a problem, on a GPU whose kernels have tensor cores. It numbers the 16 bytes
// of an image's values in 32 bits.
template <typename T, typename... Pointers>
bool fits_products(const DeformProblem& p, const Pointers*... pointers) {
  const int64_t vectors = static_cast<int64_t>(p.heads) * p.channels / kVectorSize<T>;
  return kIsHalf<T> && vectors_fit<T>(p, pointers...) && p.pixels * vectors < kNoPlace;
}

// For problems that fits_products() answers for.
template <typename T>
cudaError_t launch_deform_forward_products(const DeformProblem& p, const T* value, const float* locations,
                                           const float* weights, T* out, cudaStream_t stream) {
  if (!fits_products<T>(p, value, out)) return cudaErrorInvalidValue;
  if constexpr (kIsHalf<T>) {
    constexpr int64_t kEnoughBlocks = 4096;  // so that the last ones do not leave many multiprocessors idle
    constexpr int64_t kMostTurns = 16;
    const int64_t pairs = (p.heads + 1) / kHeadsOfWarp;
    const int64_t queries = (static_cast<int64_t>(p.queries) + kProductWarps - 1) / kProductWarps;
    const int64_t most = queries * pairs * p.images / kEnoughBlocks;
    const int32_t turns = static_cast<int32_t>(most < 1 ? 1 : most < kMostTurns ? most : kMostTurns);
    return launch_deform(&deform_forward_products<T>, (queries + turns - 1) / turns * pairs, 1, p.images, stream, p,
                         Divisor(p.points > 0 ? p.points : 1), turns, value, locations, weights, out);
  }
  return cudaSuccess;
}

}  // namespace groupdetr
