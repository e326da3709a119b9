"""The configurations of the kernel of ``matching_cost`` that are compiled where there is no GPU."""

from collections.abc import Iterator

from .._triton import CompileCase, kernel_signature
from .triton_kernels import _BLOCK_Q, _LAUNCH, _block_t, _matching_cost_kernel

__all__ = ["compile_cases"]


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and every size of a block, with the squared focal factor and with a general one."""
    for logits in ("fp32", "fp16", "bf16", "fp64"):
        for gamma in (2.0, 1.5):
            for max_targets in (16, 8, 4, 2, 1) if logits == "fp32" else (16,):
                box = "fp64" if logits == "fp64" else "fp32"
                types = {"cost": f"*{box}", "logits": f"*{logits}", "boxes": f"*{box}", "target_boxes": f"*{box}"}
                types |= {"labels": "*i64", "num_targets": "*i64"}
                constexprs: dict[str, object] = {"CLASS_WEIGHT": 2.0, "L1_WEIGHT": 5.0, "GIOU_WEIGHT": 2.0}
                constexprs |= {"ALPHA": 0.25, "GAMMA": gamma}
                block_t = _block_t(max_targets, 8 if box == "fp64" else 4)
                constexprs |= {"BLOCK_T": block_t, "BLOCK_Q": _BLOCK_Q}
                constexprs |= {"logits_stride_c": 1, "boxes_stride_c": 1}  # Triton makes a constant of a stride of 1
                yield CompileCase(
                    f"matching_cost/{logits}/gamma{gamma}/{max_targets}targets",
                    _matching_cost_kernel,
                    kernel_signature(_matching_cost_kernel, types, constexprs),
                    constexprs,
                    **_LAUNCH,
                    aligned=tuple(types),
                )
