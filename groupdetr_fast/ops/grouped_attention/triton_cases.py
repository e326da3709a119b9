"""The configurations of the kernels of ``grouped_attention`` that are compiled where there is no GPU."""

from collections.abc import Iterator

import triton

from .._triton import CompileCase, kernel_signature
from .._triton_attention import Tile, constexprs_of
from .triton_launch import _SMALL_GROUP, _TILES, _tile

__all__ = ["compile_case", "compile_cases"]


def compile_cases() -> Iterator[CompileCase]:
    """Every tile with the widest head that it serves, where registers are scarcest, with and without dropout."""
    for kernel, by_precision in _TILES.items():
        for precision, by_dim in by_precision.items():
            for dim in by_dim:
                tiles = (_tile(kernel, precision, dim, dim, queries) for queries in (_SMALL_GROUP, _SMALL_GROUP + 1))
                for tile in dict.fromkeys(tiles):
                    for dropout in (False, True):
                        for dtype in ("fp32", "fp16", "bf16") if precision == "fma" else (None,):
                            yield compile_case(kernel, precision, dim, tile, dropout, dtype)


def compile_case(
    kernel: triton.JITFunction, precision: str, dim: int, tile: Tile, dropout: bool, dtype: str | None = None
) -> CompileCase:
    """One tile of a kernel, for heads of ``dim`` channels, in ``dtype`` or else in one that has this precision."""
    of_channels = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    of_dropout = {"seed": "*i64", "row_words": "*i32"}
    types = dict.fromkeys(of_channels, f"*{dtype or ('bf16' if precision == 'half' else 'fp32')}")
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32", "keep_scale": "fp32"}
    types |= of_dropout if dropout else {}
    constexprs = constexprs_of(precision, dim, dim, tile) | ({} if dropout else dict.fromkeys(of_dropout))
    constexprs |= {f"stride_{letter}d": 1 for letter in "gqkv"}  # Triton makes a constant of a stride of 1
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature = kernel_signature(kernel, types, constexprs)
    kind = kernel.__name__.removeprefix("_grouped_attention_").removesuffix("_kernel")
    return CompileCase(
        f"grouped_attention/{kind}/{precision}{f'-{dtype}' if dtype else ''}-{dim}-{tile.block}x{tile.step}"
        f"{'-dropout' if dropout else ''}",
        kernel,
        signature,
        constexprs,
        tile.num_warps,
        tile.num_stages,
        aligned=tuple(
            name
            for name, type_ in signature.items()
            if type_[0] == "*" or (type_ == "i32" and name.startswith("stride_"))
        ),
        **({"newest": 79} if precision == "fma" else {"oldest": 80}),
    )
