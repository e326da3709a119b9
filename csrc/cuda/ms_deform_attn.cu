// Checks and launches of ms_deform_attn and its backward on the GPU; registers key CUDA.

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../choices.h"
#include "../cuda_common.h"
#include "ms_deform_attn.cuh"

namespace groupdetr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t narrow(int64_t size) {
  STD_TORCH_CHECK(size <= INT32_MAX, "ms_deform_attn: a dimension is too large");
  return static_cast<int32_t>(size);
}

DeformProblem check_inputs(const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations,
                           const Tensor& weights) {
  STD_TORCH_CHECK(value.is_cuda() && locations.is_cuda() && weights.is_cuda() &&
                      locations.get_device_index() == value.get_device_index() &&
                      weights.get_device_index() == value.get_device_index(),
                  "ms_deform_attn: all tensors must be on the same GPU");
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                  "ms_deform_attn: value, locations and weights must have 4, 6 and 5 dimensions");
  const int64_t levels = weights.size(3);
  STD_TORCH_CHECK(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels,
                  "ms_deform_attn: spatial_shapes must hold two numbers per level");
  STD_TORCH_CHECK(levels <= kMaxDeformLevels, "ms_deform_attn: on a GPU there must be at most ", kMaxDeformLevels,
                  " levels, got ", levels);
  DeformProblem p = {};
  int64_t pixels = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0, "ms_deform_attn: spatial_shapes must not be negative");
    p.level[level] = {narrow(height), narrow(width), narrow(pixels)};
    pixels += height * width;
  }
  STD_TORCH_CHECK(pixels == value.size(1), "ms_deform_attn: value must have one row per pixel of spatial_shapes");
  STD_TORCH_CHECK(weights.size(0) == value.size(0) && weights.size(2) == value.size(2),
                  "ms_deform_attn: weights must have the images and heads of value");
  for (int64_t dim = 0; dim < 5; ++dim) {
    STD_TORCH_CHECK(locations.size(dim) == weights.size(dim),
                    "ms_deform_attn: locations must have the shape of weights and 2");
  }
  STD_TORCH_CHECK(locations.size(5) == 2, "ms_deform_attn: locations must have the shape of weights and 2");
  p.images = narrow(value.size(0));
  p.pixels = narrow(pixels);
  p.heads = narrow(value.size(2));
  p.channels = narrow(value.size(3));
  p.queries = narrow(weights.size(1));
  p.levels = narrow(levels);
  p.points = narrow(weights.size(4));
  STD_TORCH_CHECK(is_supported(p), "ms_deform_attn: a product of sizes is too large");
  return p;
}

Tensor in(ScalarType dtype, const Tensor& tensor) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

ScalarType arithmetic_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `run.operator()<T>()` for the type of the kernels that stands for `dtype`.
template <typename Run>
void for_type(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run.template operator()<float>();
    case ScalarType::Double:
      return run.template operator()<double>();
    case ScalarType::Half:
      return run.template operator()<__half>();
    case ScalarType::BFloat16:
      return run.template operator()<__nv_bfloat16>();
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: value must be float32, float64, float16 or bfloat16");
  }
}

// Half types of torch and of CUDA are different C++ types.
template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor ms_deform_attn(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& locations,
                      const Tensor& weights) {
  if (!is_served(value.get_device_index())) {
    const auto stack =
        call_reference("groupdetr_fast::ms_deform_attn_reference", value, spatial_shapes, locations, weights);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const DeformProblem p = check_inputs(value, spatial_shapes, locations, weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::array<int64_t, 3> shape = {p.images, p.queries, static_cast<int64_t>(p.heads) * p.channels};
  const Tensor out = torch::stable::new_empty(value, shape);
  const ScalarType dtype = arithmetic_type(value);
  const Tensor values = torch::stable::contiguous(value), places = in(dtype, locations), factors = in(dtype, weights);
  for_type(value.scalar_type(), [&]<typename T>() {
    using A = DeformArithmetic<T>;
    const cudaStream_t stream = current_stream(value.get_device_index());
    const auto forward = [&](const auto& launch) {
      STD_CUDA_CHECK(launch(p, data<T>(values), data<A>(places), data<A>(factors), mutable_data<T>(out), stream));
    };
    if constexpr (kIsHalf<T>) {
      if (deformable_products > 0 && is_served<kOldestTensorCores>(value.get_device_index()) &&
          fits_products<T>(p, data<T>(values), data<T>(out))) {
        return forward(&launch_deform_forward_products<T>);
      }
    }
    forward(&launch_deform_forward<T>);
  });
  return out;
}

// Sorting takes time for each pixel, adding up in memory for each sample. Where there are twice as many samples as
// pixels, an H200 is done sooner without sorting, at seven times as many with it (benchmarks/gpu_report.py). Sorting in
// shared memory should pay sooner, which is for a GPU to tell.
bool pays_to_sort(const DeformProblem& p, bool in_shared_memory) {
  constexpr int64_t kSamplesOfPixel = 4, kSamplesOfPixelInSharedMemory = 1;
  return samples_of_map(p) >= (in_shared_memory ? kSamplesOfPixelInSharedMemory : kSamplesOfPixel) * p.pixels;
}

// Scratch memory, and the problem of the images that share it at a time, which bounds it.
template <typename A>
struct Scratch {
  static constexpr int64_t kBytes = int64_t{256} << 20;

  DeformProblem part;
  Tensor starts, ranks, offsets, samples, ordered;

  // `offsets_of` tells how many offsets a problem has, or is null: then there are ranks.
  Scratch(const DeformProblem& p, bool in_order, int64_t (*offsets_of)(const DeformProblem&), const Tensor& like)
      : part(of_some_images(p, in_order)),
        starts(bytes(like, starts_size(part) * sizeof(int32_t))),
        ranks(bytes(like, offsets_of == nullptr ? maps_of(part) * samples_of_map(p) * sizeof(int32_t) : 0)),
        offsets(bytes(like, offsets_of == nullptr ? 0 : offsets_of(part) * sizeof(int32_t))),
        samples(bytes(like, maps_of(part) * samples_of_map(p) * sizeof(SortedSample<A>))),
        ordered(bytes(like, in_order ? maps_of(part) * samples_of_map(p) * sizeof(SortedSample<A>) : 0)) {}

  DeformScratch<A> pointers() const {
    return {mutable_data<int32_t>(starts), mutable_data<int32_t>(ranks), mutable_data<int32_t>(offsets),
            mutable_data<SortedSample<A>>(samples), mutable_data<SortedSample<A>>(ordered)};
  }

 private:
  static DeformProblem of_some_images(DeformProblem p, bool in_order) {
    const int64_t sample = sizeof(SortedSample<A>) * (in_order ? 2 : 1) + sizeof(int32_t);
    const int64_t image = std::max<int64_t>(samples_of_map(p) * p.heads * sample, 1);
    p.images = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(kBytes / image, 1), p.images));
    return p;
  }

  static Tensor bytes(const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, std::array<int64_t, 1>{size}, ScalarType::Byte);
  }
};

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_out, const Tensor& value,
                                                           std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                           const Tensor& weights, bool deterministic) {
  if (!is_served(value.get_device_index())) {
    const auto stack = call_reference("groupdetr_fast::ms_deform_attn_backward_reference", grad_out, value,
                                      spatial_shapes, locations, weights, deterministic);
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
            torch::stable::detail::to<Tensor>(stack[2])};
  }
  const DeformProblem p = check_inputs(value, spatial_shapes, locations, weights);
  STD_TORCH_CHECK(grad_out.is_cuda() && grad_out.get_device_index() == value.get_device_index() &&
                      grad_out.dim() == 3 && grad_out.size(0) == p.images && grad_out.size(1) == p.queries &&
                      grad_out.size(2) == static_cast<int64_t>(p.heads) * p.channels,
                  "ms_deform_attn_backward: grad_out must have the shape of the result");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const ScalarType dtype = arithmetic_type(value);
  const Tensor grads = in(value.scalar_type(), grad_out), values = torch::stable::contiguous(value);
  const Tensor places = in(dtype, locations), factors = in(dtype, weights);
  const Tensor grad_locations = torch::stable::new_empty(places, places.sizes());
  const Tensor grad_weights = torch::stable::new_empty(factors, factors.sizes());
  const Tensor grad_value = deterministic ? torch::stable::new_empty(values, values.sizes())
                                          : torch::stable::new_zeros(values, values.sizes(), dtype);
  const int64_t pixels = static_cast<int64_t>(p.pixels) * p.heads * p.channels;  // of an image, as below
  const int64_t results = static_cast<int64_t>(p.queries) * p.heads * p.channels;
  const int64_t samples = samples_of_map(p) * p.heads;
  for_type(value.scalar_type(), [&]<typename T>() {
    using A = DeformArithmetic<T>;
    const cudaStream_t stream = current_stream(value.get_device_index());
    const auto backward = [&](A* sums) {
      return launch_deform_backward(p, data<T>(values), data<A>(places), data<A>(factors), data<T>(grads), sums,
                                    mutable_data<A>(grad_locations), mutable_data<A>(grad_weights), stream);
    };
    const bool in_tiles = deformable_tiles > 0 && is_served<kOldestTensorCores>(value.get_device_index()) &&
                          fits_tiles<T>(p, data<T>(values), data<T>(grads));
    const bool go_by_tiles = in_tiles && !deterministic;
    const bool shared_sort = deformable_shared_sort > 0 && pays_to_sort(p, true) &&
                             (go_by_tiles ? fits_chunks<kTileCells>(p) : fits_chunks<1>(p));
    const bool sorted =
        pays_to_sort(p, shared_sort) && (in_tiles || fits_sorted<T>(p, data<T>(values), data<T>(grads)));
    const auto backward_sorted = in_tiles ? &launch_deform_backward_tiles<T> : &launch_deform_backward_sorted<T>;
    if (!deterministic && !sorted) {
      STD_CUDA_CHECK(backward(mutable_data<A>(grad_value)));
      return;
    }
    if (deterministic) STD_CUDA_CHECK(backward(nullptr));
    const auto offsets_of = !shared_sort ? nullptr : go_by_tiles ? &offsets_size<kTileCells> : &offsets_size<1>;
    const Scratch<A> scratch(p, deterministic, offsets_of, value);
    DeformProblem part = scratch.part;
    for (int64_t first = 0; first < p.images; first += scratch.part.images) {
      part.images = static_cast<int32_t>(std::min<int64_t>(scratch.part.images, p.images - first));
      const A* const part_places = data<A>(places) + first * samples * 2;
      const A* const part_factors = data<A>(factors) + first * samples;
      const T* const part_grads = data<T>(grads) + first * results;
      if (deterministic) {
        STD_CUDA_CHECK(launch_deform_grad_value_in_order(part, part_places, part_factors, part_grads,
                                                         mutable_data<T>(grad_value) + first * pixels,
                                                         scratch.pointers(), stream));
      } else {
        STD_CUDA_CHECK(backward_sorted(part, data<T>(values) + first * pixels, part_places, part_factors, part_grads,
                                       mutable_data<A>(grad_value) + first * pixels,
                                       mutable_data<A>(grad_locations) + first * samples * 2,
                                       mutable_data<A>(grad_weights) + first * samples, scratch.pointers(), stream));
      }
    }
  });
  return {in(value.scalar_type(), grad_value), in(locations.scalar_type(), grad_locations),
          in(weights.scalar_type(), grad_weights)};
}

}  // namespace
}  // namespace groupdetr

STABLE_TORCH_LIBRARY_IMPL(groupdetr_fast, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&groupdetr::ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&groupdetr::ms_deform_attn_backward));
}
