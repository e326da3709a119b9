"""The configurations of the kernels of ``sigmoid_focal_loss`` that are compiled where there is no GPU."""

from collections.abc import Iterator

from .._triton import CompileCase, kernel_signature
from .triton_kernels import _LAUNCH, _blocks, _sigmoid_focal_loss_bwd_kernel, _sigmoid_focal_loss_fwd_kernel

__all__ = ["compile_cases"]


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and every size of a block, with the squared focal factor and with a general one."""
    for logits in ("fp32", "fp16", "bf16", "fp64"):
        loss = "fp64" if logits == "fp64" else "fp32"
        types = {"partial": f"*{loss}", "grad_loss": f"*{loss}", "logits": f"*{logits}", "grad_logits": f"*{logits}"}
        types |= {"target_classes": "*i64"}
        for gamma in (2.0, 1.5):
            for classes in (32, 16, 8, 4, 2, 1) if logits == "fp32" else (32,):
                constexprs: dict[str, object] = {"ALPHA": 0.25, "GAMMA": gamma, **_blocks(classes)}
                constexprs["stride_c"] = 1  # Triton makes a constant of a stride of 1
                for kernel in (_sigmoid_focal_loss_fwd_kernel, _sigmoid_focal_loss_bwd_kernel):
                    direction = "forward" if kernel is _sigmoid_focal_loss_fwd_kernel else "backward"
                    yield CompileCase(
                        f"sigmoid_focal_loss/{direction}/{logits}/gamma{gamma}/{classes}classes",
                        kernel,
                        kernel_signature(kernel, types, constexprs),
                        constexprs,
                        **_LAUNCH,
                        aligned=tuple(types.keys() & kernel.arg_names),
                    )
