// Multi-scale deformable attention on the CPU.
//
// The arithmetic is float32, or float64 for float64 values; half types are converted before and after. Forward runs in
// parallel over queries. Backward runs in parallel over (image, head): each task adds into its own gradient map,
// without atomics, in a fixed order.

#include "../ms_deform_attn.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../common.h"
#include "simd.h"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Problem {
  int64_t images, pixels, heads, channels, queries, samples;  // samples: of one query and head, levels x points

  int64_t row() const { return heads * channels; }
};

// Of each of a query's samples, the level that it reads.
template <typename T>
struct SampleLevels {
  std::vector<int32_t> height, width, start;
  std::vector<T> real_height, real_width;

  SampleLevels(const std::vector<int64_t>& spatial_shapes, int64_t points) {
    int64_t first = 0;
    for (size_t level = 0; level < spatial_shapes.size(); level += 2) {
      const int64_t h = spatial_shapes[level], w = spatial_shapes[level + 1];
      for (int64_t point = 0; point < points; ++point) {
        height.push_back(static_cast<int32_t>(h));
        width.push_back(static_cast<int32_t>(w));
        start.push_back(static_cast<int32_t>(first));
        real_height.push_back(static_cast<T>(h));
        real_width.push_back(static_cast<T>(w));
      }
      first += h * w;
    }
  }
};

// The corners of one query's and head's samples: numbers of the same meaning side by side, one column per sample.
// Corner c = 2 * i + j is (y[i], x[j]) of ms_deform_attn.h, with 0 for low and 1 for high.
template <typename T>
class Corners {
 public:
  explicit Corners(int64_t samples) : samples_(samples), pixels_(5 * samples), numbers_(14 * samples) {}

  int32_t* pixel(int corner) { return pixels_.data() + corner * samples_; }
  T* weight(int corner) { return column(8 + corner); }  // with the attention weight in it

  // A sample that touches no pixel gets -1 as its pixel of corner 0.
  ALWAYS_INLINE void compute(const SampleLevels<T>& levels, const T* location, const T* attention) {
    const int32_t *height = levels.height.data(), *width = levels.width.data(), *start = levels.start.data();
    const T *real_height = levels.real_height.data(), *real_width = levels.real_width.data();
    T *const numbers = numbers_.data(), *const xs = column(12), *const ys = column(13);
    int32_t *const pixels = pixels_.data(), *const outside = pixel(4);
    const int64_t n = samples_;
    // Two loops, because compilers do not vectorise them as one.
#pragma GCC ivdep
    for (int64_t s = 0; s < n; ++s) {
      const T x = to_pixels(location[2 * s], real_width[s]);
      const T y = to_pixels(location[2 * s + 1], real_height[s]);
      const bool inside = is_inside(x, y, real_width[s], real_height[s]);
      xs[s] = inside ? x : T(0);
      ys[s] = inside ? y : T(0);
      outside[s] = inside ? 0 : -1;
    }
#pragma GCC ivdep
    for (int64_t s = 0; s < n; ++s) {
      const AxisCorners<T> on_x = axis_corners(xs[s], width[s]);
      const AxisCorners<T> on_y = axis_corners(ys[s], height[s]);
      const T a = attention[s];
      const int32_t low_row = start[s] + on_y.low * width[s], high_row = start[s] + on_y.high * width[s];
      pixels[s] = (low_row + on_x.low) | outside[s];
      pixels[n + s] = low_row + on_x.high;
      pixels[2 * n + s] = high_row + on_x.low;
      pixels[3 * n + s] = high_row + on_x.high;
      numbers[s] = on_x.low_weight;
      numbers[n + s] = on_x.high_weight;
      numbers[2 * n + s] = on_y.low_weight;
      numbers[3 * n + s] = on_y.high_weight;
      numbers[4 * n + s] = on_x.low_slope;
      numbers[5 * n + s] = on_x.high_slope;
      numbers[6 * n + s] = on_y.low_slope;
      numbers[7 * n + s] = on_y.high_slope;
      numbers[8 * n + s] = a * on_y.low_weight * on_x.low_weight;
      numbers[9 * n + s] = a * on_y.low_weight * on_x.high_weight;
      numbers[10 * n + s] = a * on_y.high_weight * on_x.low_weight;
      numbers[11 * n + s] = a * on_y.high_weight * on_x.high_weight;
    }
  }

  // The gradients of one query's and head's locations and attention weights; dots [samples, 4] are of each corner's
  // value and the gradient of the result.
  ALWAYS_INLINE void gradients(const SampleLevels<T>& levels, const T* attention, const T* dots, T* grad_location,
                               T* grad_attention) const {
    const int64_t n = samples_;
    const T *x_low = column(0), *x_high = column(1), *y_low = column(2), *y_high = column(3);
    const T *x_low_slope = column(4), *x_high_slope = column(5), *y_low_slope = column(6), *y_high_slope = column(7);
    const T *real_height = levels.real_height.data(), *real_width = levels.real_width.data();
#pragma GCC ivdep
    for (int64_t s = 0; s < n; ++s) {
      // Along x first, in the lower and the upper row.
      const T low = x_low[s] * dots[4 * s] + x_high[s] * dots[4 * s + 1];
      const T high = x_low[s] * dots[4 * s + 2] + x_high[s] * dots[4 * s + 3];
      const T low_slope = x_low_slope[s] * dots[4 * s] + x_high_slope[s] * dots[4 * s + 1];
      const T high_slope = x_low_slope[s] * dots[4 * s + 2] + x_high_slope[s] * dots[4 * s + 3];
      grad_attention[s] = y_low[s] * low + y_high[s] * high;
      grad_location[2 * s] = attention[s] * real_width[s] * (y_low[s] * low_slope + y_high[s] * high_slope);
      grad_location[2 * s + 1] = attention[s] * real_height[s] * (y_low_slope[s] * low + y_high_slope[s] * high);
    }
  }

 private:
  const T* column(int index) const { return numbers_.data() + index * samples_; }
  T* column(int index) { return numbers_.data() + index * samples_; }

  int64_t samples_;
  std::vector<int32_t> pixels_;
  std::vector<T> numbers_;
};

// Calls `piece.operator()<V, count>(first)` for channels [first, first + count * lanes of V) until all are done: 32,
// then 8, then 1 at a time.
template <typename T, int kBytes, class Piece>
ALWAYS_INLINE void for_channel_pieces(int64_t channels, const Piece& piece) {
  constexpr int kWide = kBytes / sizeof(T);
  constexpr int kNarrowBytes = std::min<int>(kBytes, 8 * sizeof(T));
  constexpr int kNarrow = kNarrowBytes / sizeof(T);
  int64_t first = 0;
  for (; first + 32 <= channels; first += 32) piece.template operator()<Vector<T, kBytes>, 32 / kWide>(first);
  for (; first + 8 <= channels; first += 8) piece.template operator()<Vector<T, kNarrowBytes>, 8 / kNarrow>(first);
  for (; first < channels; ++first) piece.template operator()<T, 1>(first);
}

template <typename T, int kBytes>
ALWAYS_INLINE void forward_queries(const Problem& p, const SampleLevels<T>& levels, const T* value, const T* locations,
                                   const T* weights, T* out, int64_t begin, int64_t end) {
  Corners<T> corners(p.samples);
  for (int64_t query = begin; query < end; ++query) {
    const T* image = value + query / p.queries * p.pixels * p.row();
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t index = query * p.heads + head;
      corners.compute(levels, locations + index * p.samples * 2, weights + index * p.samples);
      const T* map = image + head * p.channels;
      T* result = out + index * p.channels;
      for_channel_pieces<T, kBytes>(p.channels,
                                    [&]<typename V, int kCount>(int64_t first) __attribute__((always_inline)) {
                                      V sums[kCount] = {};
                                      for (int64_t s = 0; s < p.samples; ++s) {
                                        if (corners.pixel(0)[s] < 0) continue;
#pragma GCC unroll 4
                                        for (int c = 0; c < 4; ++c) {
                                          const T* from = map + corners.pixel(c)[s] * p.row() + first;
                                          const T weight = corners.weight(c)[s];
#pragma GCC unroll 16
                                          for (int k = 0; k < kCount; ++k) {
                                            V values;
                                            load(values, from + k * (sizeof(V) / sizeof(T)));
                                            sums[k] += weight * values;
                                          }
                                        }
                                      }
#pragma GCC unroll 16
                                      for (int k = 0; k < kCount; ++k)
                                        store(result + first + k * (sizeof(V) / sizeof(T)), sums[k]);
                                    });
    }
  }
}

// Lanes of one 16-byte vector.
template <typename T>
constexpr int kPartialLanes = 16 / sizeof(T);

// Adds `vector`, folded to 16 bytes, to partial[0 ... kPartialLanes).
template <typename T, typename V>
ALWAYS_INLINE void add_folded(T* partial, const V& vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    partial[0] += vector;
  } else if constexpr (sizeof(V) > 16) {
    Vector<T, sizeof(V) / 2> low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    add_folded(partial, low + high);
  } else {
    V sum;
    load(sum, partial);
    store(partial, sum + vector);
  }
}

// Queries [begin, end) of one image and head: reads `map` and adds to `grad_map`, both [pixels, channels], writes the
// other gradients.
template <typename T, int kBytes>
ALWAYS_INLINE void backward_queries(const Problem& p, const SampleLevels<T>& levels, const T* map, const T* locations,
                                    const T* weights, const T* grad_out, T* grad_map, T* grad_locations,
                                    T* grad_weights, int64_t image, int64_t head, int64_t begin, int64_t end) {
  Corners<T> corners(p.samples);
  // <value of corner c of sample s, grad_out> at [4 * s + c]; first in parts, which are added up for all samples at
  // once.
  constexpr int kParts = kPartialLanes<T>;
  std::vector<T> part_storage(4 * p.samples * kParts), dot_storage(4 * p.samples);
  T *const parts = part_storage.data(), *const dots = dot_storage.data();
  for (int64_t query = begin; query < end; ++query) {
    const int64_t index = (image * p.queries + query) * p.heads + head;
    const T* attention = weights + index * p.samples;
    const T* grad = grad_out + index * p.channels;
    corners.compute(levels, locations + index * p.samples * 2, attention);
    std::fill_n(parts, 4 * p.samples * kParts, T(0));
    for_channel_pieces<T, kBytes>(p.channels,
                                  [&]<typename V, int kCount>(int64_t first) __attribute__((always_inline)) {
                                    constexpr int kLanes = sizeof(V) / sizeof(T);
                                    V grads[kCount];
#pragma GCC unroll 16
                                    for (int k = 0; k < kCount; ++k) load(grads[k], grad + first + k * kLanes);
                                    for (int64_t s = 0; s < p.samples; ++s) {
                                      if (corners.pixel(0)[s] < 0) continue;
#pragma GCC unroll 4
                                      for (int c = 0; c < 4; ++c) {
                                        const int64_t pixel = corners.pixel(c)[s];
                                        const T* from = map + pixel * p.channels + first;
                                        T* to = grad_map + pixel * p.channels + first;
                                        const T weight = corners.weight(c)[s];
                                        V products = {};
#pragma GCC unroll 16
                                        for (int k = 0; k < kCount; ++k) {
                                          V values, sums;
                                          load(values, from + k * kLanes);
                                          products += values * grads[k];
                                          load(sums, to + k * kLanes);
                                          sums += weight * grads[k];
                                          store(to + k * kLanes, sums);
                                        }
                                        add_folded(parts + (4 * s + c) * kParts, products);
                                      }
                                    }
                                  });
    for (int64_t i = 0; i < 4 * p.samples; ++i) {
      dots[i] = parts[i * kParts] + parts[i * kParts + 1];
      if constexpr (kParts == 4) dots[i] += parts[i * kParts + 2] + parts[i * kParts + 3];
    }
    T* grad_location = grad_locations + index * p.samples * 2;
    T* grad_weight = grad_weights + index * p.samples;
    corners.gradients(levels, attention, dots, grad_location, grad_weight);
  }
}

// Work (samples x channels) below which another thread does not pay.
constexpr int64_t kWorkPerThread = 1 << 15;

template <typename T>
void forward(const Problem& p, const SampleLevels<T>& levels, const T* value, const T* locations, const T* weights,
             T* out) {
  const int64_t work = std::max<int64_t>(1, p.heads * p.samples * p.channels);
  torch::stable::parallel_for(0, p.images * p.queries, 1 + kWorkPerThread / work, [&](int64_t begin, int64_t end) {
    with_simd([&]<int kBytes>() __attribute__((always_inline)) {
      forward_queries<T, kBytes>(p, levels, value, locations, weights, out, begin, end);
    });
  });
}

// Each (image, head) is cut into `slices` ranges of queries, each with a gradient map of its own: as many as it takes
// to occupy all threads. The maps are then summed in the order of the slices.
template <typename T>
void backward(const Problem& p, const SampleLevels<T>& levels, const T* value, const T* locations, const T* weights,
              const T* grad_out, T* grad_value, T* grad_locations, T* grad_weights) {
  const int64_t maps = p.images * p.heads;
  const int64_t map_size = p.pixels * p.channels;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = std::min((threads + maps - 1) / maps, p.queries);
  const int64_t queries_per_slice = (p.queries + slices - 1) / slices;

  const auto accumulate = [&](int64_t task, T* map, T* grad_map) {
    const int64_t image = task / slices / p.heads, head = task / slices % p.heads, slice = task % slices;
    const int64_t begin = std::min(slice * queries_per_slice, p.queries);
    const int64_t end = std::min(begin + queries_per_slice, p.queries);
    // Rows of one head lie a multiple of the cache's set stride apart: read in place they would evict each other.
    const T* from = value + image * p.pixels * p.row() + head * p.channels;
    for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
      std::copy_n(from + pixel * p.row(), p.channels, map + pixel * p.channels);
    }
    std::fill_n(grad_map, map_size, T(0));
    with_simd([&]<int kBytes>() __attribute__((always_inline)) {
      backward_queries<T, kBytes>(p, levels, map, locations, weights, grad_out, grad_map, grad_locations, grad_weights,
                                  image, head, begin, end);
    });
  };
  const auto write_pixels = [&](int64_t index, const T* grad_maps, int64_t begin, int64_t end) {
    T* to = grad_value + index / p.heads * p.pixels * p.row() + index % p.heads * p.channels;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T* from = grad_maps + pixel * p.channels;
      T* sums = to + pixel * p.row();
      std::copy_n(from, p.channels, sums);
      for (int64_t slice = 1; slice < slices; ++slice) {
        for (int64_t d = 0; d < p.channels; ++d) sums[d] += from[slice * map_size + d];
      }
    }
  };

  if (slices == 1) {
    torch::stable::parallel_for(0, maps, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> map(map_size), grad_map(map_size);
      for (int64_t index = begin; index < end; ++index) {
        accumulate(index, map.data(), grad_map.data());
        write_pixels(index, grad_map.data(), 0, p.pixels);
      }
    });
    return;
  }
  std::vector<T> grad_maps(maps * slices * map_size);
  torch::stable::parallel_for(0, maps * slices, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> map(map_size);
    for (int64_t task = begin; task < end; ++task) accumulate(task, map.data(), grad_maps.data() + task * map_size);
  });
  torch::stable::parallel_for(0, maps * p.pixels, 1 + kWorkPerThread / p.channels, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = row / p.pixels, pixel = row % p.pixels;
      write_pixels(index, grad_maps.data() + index * slices * map_size, pixel, pixel + 1);
    }
  });
}

Problem check_inputs(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations,
                     const Tensor& weights) {
  STD_TORCH_CHECK(value.is_cpu() && locations.is_cpu() && weights.is_cpu(),
                  "ms_deform_attn: all tensors must be on the CPU");
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                  "ms_deform_attn: value, locations and weights must have 4, 6 and 5 dimensions");
  const int64_t levels = weights.size(3), points = weights.size(4);
  STD_TORCH_CHECK(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels,
                  "ms_deform_attn: spatial_shapes must hold two numbers per level");
  int64_t pixels = 0;
  for (size_t level = 0; level < spatial_shapes.size(); level += 2) {
    const int64_t height = spatial_shapes[level], width = spatial_shapes[level + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0, "ms_deform_attn: spatial_shapes must not be negative");
    // Sizes first: the product and the sum of large ones would overflow, perhaps to the number of rows.
    STD_TORCH_CHECK(height <= INT32_MAX && width <= INT32_MAX && pixels + height * width <= INT32_MAX,
                    "ms_deform_attn: value must have at most 2^31 - 1 rows");
    pixels += height * width;
  }
  STD_TORCH_CHECK(pixels == value.size(1), "ms_deform_attn: value must have one row per pixel of spatial_shapes");
  STD_TORCH_CHECK(weights.size(0) == value.size(0) && weights.size(2) == value.size(2),
                  "ms_deform_attn: weights must have the images and heads of value");
  for (int64_t d = 0; d < 5; ++d) {
    STD_TORCH_CHECK(locations.size(d) == weights.size(d),
                    "ms_deform_attn: locations must have the shape of weights and 2");
  }
  STD_TORCH_CHECK(locations.size(5) == 2, "ms_deform_attn: locations must have the shape of weights and 2");
  return {value.size(0), pixels, value.size(2), value.size(3), weights.size(1), levels * points};
}

Tensor in(ScalarType dtype, const Tensor& tensor) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

ScalarType arithmetic_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& locations,
                      const Tensor& weights) {
  const Problem p = check_inputs(value, spatial_shapes, locations, weights);
  const ScalarType dtype = arithmetic_type(value);
  const Tensor values = in(dtype, value), places = in(dtype, locations), factors = in(dtype, weights);
  const std::array<int64_t, 3> shape = {p.images, p.queries, p.row()};
  if (p.pixels == 0 || p.samples == 0) return torch::stable::new_zeros(value, shape);
  const Tensor out = torch::stable::new_empty(values, shape);
  const auto run = [&]<typename T>() {
    const SampleLevels<T> levels(spatial_shapes, weights.size(4));
    forward(p, levels, values.const_data_ptr<T>(), places.const_data_ptr<T>(), factors.const_data_ptr<T>(),
            out.mutable_data_ptr<T>());
  };
  dtype == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
  return in(value.scalar_type(), out);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_out, const Tensor& value,
                                                           std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                           const Tensor& weights, bool /*deterministic*/) {
  const Problem p = check_inputs(value, spatial_shapes, locations, weights);
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.dim() == 3 && grad_out.size(0) == p.images &&
                      grad_out.size(1) == p.queries && grad_out.size(2) == p.row(),
                  "ms_deform_attn_backward: grad_out must have the shape of the result");
  const ScalarType dtype = arithmetic_type(value);
  if (grad_out.numel() == 0 || p.pixels == 0 || p.samples == 0) {
    return {torch::stable::new_zeros(value, value.sizes()), torch::stable::new_zeros(locations, locations.sizes()),
            torch::stable::new_zeros(weights, weights.sizes())};
  }
  const Tensor grads = in(dtype, grad_out), values = in(dtype, value);
  const Tensor places = in(dtype, locations), factors = in(dtype, weights);
  const Tensor grad_value = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_locations = torch::stable::new_empty(places, places.sizes());
  const Tensor grad_weights = torch::stable::new_empty(factors, factors.sizes());
  const auto run = [&]<typename T>() {
    const SampleLevels<T> levels(spatial_shapes, weights.size(4));
    backward(p, levels, values.const_data_ptr<T>(), places.const_data_ptr<T>(), factors.const_data_ptr<T>(),
             grads.const_data_ptr<T>(), grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<T>(),
             grad_weights.mutable_data_ptr<T>());
  };
  dtype == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
  return {in(value.scalar_type(), grad_value), in(locations.scalar_type(), grad_locations),
          in(weights.scalar_type(), grad_weights)};
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&groupdetr::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&groupdetr::ms_deform_attn_backward));
}
