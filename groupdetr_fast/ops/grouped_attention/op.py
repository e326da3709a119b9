"""The op ``grouped_attention``: self-attention of queries that fall into groups."""

from typing import Any

from torch import Tensor

from ..._eager import EagerOp
from ..._library import block_double_backward, define_op
from ...groups import QueryGroups
from .._attention import check_kinds, fake, fake_backward, settled
from .._dropout import new_seed
from .._triton import register_triton
from . import cpu
from .reference import grouped_attention_backward_reference, grouped_attention_reference


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: QueryGroups | int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention in which every query sees its own group only (Group DETR, section 3.2).

    With one group this is ``scaled_dot_product_attention``. No array of size L x L is ever allocated, but on GPUs with
    float64 or heads of more than 128 channels (64 before compute capability 8.0), which run on the reference.

    Args:
        query: ``[B, L, H, D]``: images, queries, heads, channels.
        key: ``[B, L, H, D]``.
        value: ``[B, L, H, Dv]``.
        groups: how the L queries fall into groups and denoising segments; a number K stands for K groups of L / K
            queries, one after another.
        dropout_p: probability to drop an attention probability, in [0, 1); pass 0 in evaluation. The others are scaled
            by ``1 / (1 - dropout_p)``. What is dropped follows from a seed that is drawn from torch's default
            generator of the device (``torch.manual_seed``).
        scale: factor of the dot products; ``1 / sqrt(D)`` if None.

    Returns:
        ``[B, L, H, Dv]``, contiguous, in the dtype of the inputs.

    The inputs share one dtype: float32, float64, float16 or bfloat16. Sums over keys and channels are accumulated in
    float32 (float64 for float64), also under autocast. On GPUs, products of float32 lose precision to TF32 only if
    torch may use that for matrices (``torch.set_float32_matmul_precision``). Forward and backward are deterministic.
    There is no double backward.

    Raises:
        TypeError: if the dtypes differ or are none of these, or for groups that are no integer.
        ValueError: if a shape, a device, the groups or dropout_p do not fit.
    """
    _check(query, key, value)
    layout = _layout(groups, query.shape[1])
    dropout_p, scale = settled(query, dropout_p, scale)
    seed = new_seed(query.device) if dropout_p > 0 else None
    return _op(query, key, value, layout, dropout_p, seed, scale)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_kinds(query, key, value)
    if key.shape != query.shape:
        raise ValueError(f"key must have the shape of query, {list(query.shape)}, got {list(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != query.shape[:3]:
        batch, length, heads, _ = query.shape
        raise ValueError(f"value must have shape [{batch}, {length}, {heads}, Dv], got {list(value.shape)}")


def _layout(groups: QueryGroups | int, length: int) -> list[int]:
    """The layout as the op takes it, checked against the number of queries."""
    if isinstance(groups, QueryGroups):
        if groups.length != length:
            raise ValueError(f"groups must describe the L = {length} queries, got {groups.length} in {groups}")
        return groups.as_ints()
    if isinstance(groups, float | str):
        raise TypeError(f"groups must be an integer or QueryGroups, got {groups!r}")
    if groups < 1 or length < 1 or length % groups != 0:
        raise ValueError(f"groups must divide the number of queries, L = {length}, got {groups}")
    return QueryGroups(groups, length // groups).as_ints()


define_op(
    "grouped_attention(Tensor query, Tensor key, Tensor value, SymInt[] layout, float dropout_p, Tensor? seed, "
    "float scale) -> (Tensor out, Tensor lse)",
    reference=grouped_attention_reference,
    fake=fake,
    public=True,
)
define_op(
    "grouped_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "SymInt[] layout, float dropout_p, Tensor? seed, float scale) -> (Tensor, Tensor, Tensor)",
    reference=grouped_attention_backward_reference,
    fake=fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.layout, ctx.dropout_p, seed, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, seed)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Any) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, seed = ctx.saved_tensors
    grad_query, grad_key, grad_value = _op_backward(
        grad_out, query, key, value, out, lse, ctx.layout, ctx.dropout_p, seed, ctx.scale
    )
    no_grad_layout = no_grad_dropout_p = no_grad_seed = no_grad_scale = None
    return grad_query, grad_key, grad_value, no_grad_layout, no_grad_dropout_p, no_grad_seed, no_grad_scale


_op = EagerOp("grouped_attention")
_op_backward = EagerOp("grouped_attention_backward")
_op.register_autograd(setup_context=_setup_context, backward=_backward, returns_first=True)
block_double_backward("grouped_attention_backward")
cpu.register()
for op, launcher in (("grouped_attention", "forward"), ("grouped_attention_backward", "backward")):
    register_triton(op, f"{__package__}.triton_launch", launcher)
