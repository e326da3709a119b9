// Checks and launches of ms_deform_attn and its backward on the GPU; registers key CUDA.

#include <array>
#include <tuple>
#include <vector>

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
  const DeformProblem p = check_inputs(value, spatial_shapes, locations, weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::array<int64_t, 3> shape = {p.images, p.queries, static_cast<int64_t>(p.heads) * p.channels};
  const Tensor out = torch::stable::new_empty(value, shape);
  const ScalarType dtype = arithmetic_type(value);
  const Tensor values = torch::stable::contiguous(value), places = in(dtype, locations), factors = in(dtype, weights);
  for_type(value.scalar_type(), [&]<typename T>() {
    using A = DeformArithmetic<T>;
    STD_CUDA_CHECK(launch_deform_forward(p, data<T>(values), data<A>(places), data<A>(factors), mutable_data<T>(out),
                                         current_stream(value.get_device_index())));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_out, const Tensor& value,
                                                           std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                           const Tensor& weights, bool deterministic) {
  const DeformProblem p = check_inputs(value, spatial_shapes, locations, weights);
  STD_TORCH_CHECK(grad_out.is_cuda() && grad_out.get_device_index() == value.get_device_index() &&
                      grad_out.dim() == 3 && grad_out.size(0) == p.images && grad_out.size(1) == p.queries &&
                      grad_out.size(2) == static_cast<int64_t>(p.heads) * p.channels,
                  "ms_deform_attn_backward: grad_out must have the shape of the result");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const ScalarType dtype = arithmetic_type(value);
  const Tensor grads = in(value.scalar_type(), grad_out), values = torch::stable::contiguous(value);
  const Tensor places = in(dtype, locations), factors = in(dtype, weights);
  const Tensor grad_value = deterministic ? torch::stable::new_empty(values, values.sizes())
                                          : torch::stable::new_zeros(values, values.sizes(), dtype);
  const Tensor grad_locations = torch::stable::new_empty(places, places.sizes());
  const Tensor grad_weights = torch::stable::new_empty(factors, factors.sizes());
  for_type(value.scalar_type(), [&]<typename T>() {
    using A = DeformArithmetic<T>;
    const cudaStream_t stream = current_stream(value.get_device_index());
    A* const sums = deterministic ? nullptr : mutable_data<A>(grad_value);
    STD_CUDA_CHECK(launch_deform_backward(p, data<T>(values), data<A>(places), data<A>(factors), data<T>(grads), sums,
                                          mutable_data<A>(grad_locations), mutable_data<A>(grad_weights), stream));
    if (deterministic) {
      STD_CUDA_CHECK(launch_deform_grad_value_in_order(p, data<A>(places), data<A>(factors), data<T>(grads),
                                                       mutable_data<T>(grad_value), stream));
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
