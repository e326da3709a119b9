"""The configurations of the kernels of ``cross_attention`` that are compiled where there is no GPU."""

from collections.abc import Iterator

import triton

from .._triton import CompileCase, kernel_signature
from .._triton_attention import Tile, constexprs_of
from .triton_kernels import _cross_attention_order_kernel, _cross_attention_sum_kernel
from .triton_launch import _TILES, _WALK

__all__ = ["compile_case", "compile_cases"]


def compile_cases() -> Iterator[CompileCase]:
    """Every tile with the widest head that it serves, where registers are scarcest, with and without dropout.

    Besides, in half types, heads as Conditional DETR has them, whose keys are twice as wide as their values; and these
    without padding.
    """
    # Without tensor cores the op runs on its reference.
    return (case._replace(oldest=80) for case in _cases())


def _cases() -> Iterator[CompileCase]:
    for kernel, by_precision in _TILES.items():
        for precision, by_dim in by_precision.items():
            for dim, tile in by_dim.items():
                for dropout in (False, True):
                    yield compile_case(kernel, precision, (dim, dim), tile, dropout=dropout)
        tile = by_precision["half"][64]
        yield compile_case(kernel, "half", (64, 32), tile, dropout=True)
        yield compile_case(kernel, "half", (64, 32), tile, dropout=True, padding=False)
    yield _of_lists()
    for dtype in ("bf16", "fp32"):
        yield _of_sums(dtype)


def compile_case(
    kernel: triton.JITFunction,
    precision: str,
    dims: tuple[int, int],
    tile: Tile,
    *,
    dropout: bool,
    padding: bool = True,
) -> CompileCase:
    """One tile of a kernel, for heads of ``dims`` channels: of queries and keys, and of values."""
    of_channels = ("query", "key", "value", "out", "grad_out", "grad_query")
    of_dropout = {"seed": "*i64", "row_words": "*i32"}
    of_padding = {"order": "*i32"}
    types = dict.fromkeys(of_channels, "*bf16" if precision == "half" else "*fp32")
    # The gradients of keys and values are partial sums where queries are cut into chunks.
    types |= dict.fromkeys(("lse", "delta", "grad_key", "grad_value"), "*fp32")
    types |= {"scale": "fp32", "keep_scale": "fp32"}
    absent = ([] if dropout else list(of_dropout)) + ([] if padding else list(of_padding))
    types |= {name: type_ for name, type_ in (of_dropout | of_padding).items() if name not in absent}
    constexprs = constexprs_of(precision, *dims, tile) | dict.fromkeys(absent)
    constexprs |= {f"stride_{letter}d": 1 for letter in "gqkv"}  # Triton makes a constant of a stride of 1
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = kernel_signature(kernel, types, constexprs)
    kind = kernel.__name__.removeprefix("_cross_attention_").removesuffix("_kernel")
    size = str(dims[0]) if dims[0] == dims[1] else f"{dims[0]}+{dims[1]}"
    options = f"{'-dropout' if dropout else ''}{'' if padding else '-unpadded'}"
    return CompileCase(
        f"cross_attention/{kind}/{precision}-{size}-{tile.block}x{tile.step}{options}",
        kernel,
        signature,
        constexprs,
        tile.num_warps,
        tile.num_stages,
        aligned=_aligned(signature),
    )


def _of_lists() -> CompileCase:
    kernel, launch = _cross_attention_order_kernel, _WALK
    constexprs: dict[str, object] = {"BLOCK": launch["BLOCK"], "stride_ps": 1}
    signature = kernel_signature(kernel, {"order": "*i32", "padding": "*u8"}, constexprs)
    name = f"cross_attention/order/{launch['BLOCK']}"
    return CompileCase(name, kernel, signature, constexprs, launch["num_warps"], 2, ("order", "padding"))


def _of_sums(dtype: str) -> CompileCase:
    kernel, launch = _cross_attention_sum_kernel, _WALK
    constexprs: dict[str, object] = {"BLOCK": launch["BLOCK"]}
    types = {
        f"{of}_{what}": type_ for of in ("key", "value") for what, type_ in (("total", f"*{dtype}"), ("parts", "*fp32"))
    }
    signature = kernel_signature(kernel, types, constexprs)
    name = f"cross_attention/sum/{dtype}-{launch['BLOCK']}"
    aligned = (*types, "key_size", "value_size")
    return CompileCase(name, kernel, signature, constexprs, launch["num_warps"], 2, aligned)


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    """Addresses, and strides of images, rows and heads."""
    return tuple(
        name for name, type_ in signature.items() if type_[0] == "*" or (type_ == "i32" and name.startswith("stride_"))
    )
