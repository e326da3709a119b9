// An op that does what a compiled CUDA kernel does on a GPU that it has no code for: it calls the op's reference.

#include "common.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad_out, const Tensor& value,
                                                           std::vector<int64_t> spatial_shapes, const Tensor& locations,
                                                           const Tensor& weights, bool deterministic) {
  const auto stack = groupdetr::call_reference("groupdetr_fast::ms_deform_attn_backward_reference", grad_out, value,
                                               spatial_shapes, locations, weights, deterministic);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

Tensor linear_assignment(const Tensor& cost, const Tensor& num_targets) {
  const auto stack = groupdetr::call_reference("groupdetr_fast::linear_assignment_reference", cost, num_targets);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY(reference_caller, m) {
  m.def("linear_assignment(Tensor cost, Tensor num_targets) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_out, Tensor value, int[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(reference_caller, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&linear_assignment));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}
