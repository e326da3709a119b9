"""Groups inside ``torch.nn.MultiheadAttention``, for decoders that are built of it."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops

__all__ = ["GroupedMultiheadAttention", "attend_in_groups", "group_self_attention"]


class GroupedMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` in which every query sees its own group only (Group DETR, section 3.2).

    The sequence is cut into groups of ``queries_per_group`` queries, one after another, in training and evaluation
    alike: K * N queries are K groups, and N queries, as inference has them, are one, with the result of
    ``torch.nn.MultiheadAttention``. Parameters, their names and the arguments are those of that class.

    Args:
        embed_dim, num_heads, dropout, batch_first: as in ``torch.nn.MultiheadAttention``; ``bias``, ``device`` and
            ``dtype`` too.
        queries_per_group: N.

    Raises:
        ValueError: if ``queries_per_group`` is below 1, or for another option of ``torch.nn.MultiheadAttention``.
    """

    queries_per_group: int

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, *, queries_per_group: int, **options: Any):
        super().__init__(embed_dim, num_heads, dropout, **options)
        _check(self, queries_per_group)
        self.queries_per_group = queries_per_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of queries to the queries of their group.

        Args:
            query, key, value: ``[L, B, d]``, or ``[B, L, d]`` with ``batch_first``; without a batch ``[L, d]``. L is
                a multiple of N, the same in all three.
            key_padding_mask, attn_mask: must be None, and ``is_causal`` False: the groups are the mask.
            need_weights, average_attn_weights: without effect, since no attention weights are kept.

        Returns:
            The result, of the shape of ``query``, and None in the place of the weights.

        Raises:
            ValueError: for a mask, or if a shape does not fit.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError(
                "GroupedMultiheadAttention takes no mask, since the groups are one: leave out attn_mask, "
                "key_padding_mask and is_causal"
            )
        if query.dim() not in (2, 3) or not query.shape == key.shape == value.shape:
            shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
            raise ValueError(
                f"query, key and value must have one shape, {'[B, L, d]' if self.batch_first else '[L, B, d]'}, "
                f"got {shapes}: this is self-attention"
            )
        if query.dim() == 2:
            without_batch = 0 if self.batch_first else 1
            out, _ = self(*(each.unsqueeze(without_batch) for each in (query, key, value)))
            return out.squeeze(without_batch), None
        length = query.shape[1 if self.batch_first else 0]
        if length == 0 or length % self.queries_per_group:
            raise ValueError(
                f"the queries must be whole groups of {self.queries_per_group}, got {length} in {list(query.shape)} "
                f"({'[B, L, d]' if self.batch_first else '[L, B, d]'})"
            )
        return attend_in_groups(self, query, key, value, length // self.queries_per_group), None


def attend_in_groups(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """The result of an attention module where every query sees its own group only.

    Args:
        module: whose parameters, dropout and order of dimensions are used.
        query, key, value: ``[L, B, d]``, or ``[B, L, d]`` with ``batch_first``, of one shape.
        groups: K, which divides L.
    """
    out = ops.grouped_attention(
        _heads(module, query, 0),
        _heads(module, key, 1),
        _heads(module, value, 2),
        groups,
        dropout_p=module.dropout if module.training else 0.0,
    )
    out = module.out_proj(out.flatten(2))
    return out if module.batch_first else out.transpose(0, 1)


def _heads(module: nn.MultiheadAttention, inputs: Tensor, part: int) -> Tensor:
    """The heads ``[B, L, H, D]`` of queries, keys or values, which are parts 0, 1 and 2 of the weights."""
    rows = slice(part * module.embed_dim, (part + 1) * module.embed_dim)
    bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
    projected = F.linear(inputs if module.batch_first else inputs.transpose(0, 1), module.in_proj_weight[rows], bias)
    return projected.unflatten(2, (module.num_heads, module.head_dim))


def group_self_attention(decoder: nn.Module, queries_per_group: int, *, name: str = "self_attn") -> nn.Module:
    """Let the self-attention of a decoder stay inside groups of queries.

    In place: every ``torch.nn.MultiheadAttention`` that is called ``name`` becomes a
    :class:`GroupedMultiheadAttention`, with the parameters that it has, so that optimisers, checkpoints and copies go
    on as before. Cross-attention keeps its class. A subclass is refused, since what it computes would be lost.

    Args:
        decoder: of ``torch.nn.TransformerDecoderLayer`` or of one's own; not with an encoder, whose tokens are no
            queries.
        queries_per_group: N, queries of one group.
        name: of the attribute that holds self-attention in each layer.

    Returns:
        The decoder.

    Raises:
        ValueError: if ``queries_per_group`` is below 1, there is no such attention, one is of a subclass or has an
            option that is not supported, or the decoder has an encoder in it.
    """
    modules = list(decoder.named_modules())
    encoders = [path for path, module in modules if isinstance(module, nn.TransformerEncoderLayer)]
    if encoders:
        raise ValueError(f"{encoders[0]} is an encoder, whose tokens are no queries: pass the decoder alone")
    found = {
        path: module
        for path, module in modules
        if path.rpartition(".")[2] == name and isinstance(module, nn.MultiheadAttention)
    }
    if not found:
        raise ValueError(f"the decoder has no torch.nn.MultiheadAttention called {name}: name the attribute by name=")
    for path, module in found.items():
        if type(module) not in (nn.MultiheadAttention, GroupedMultiheadAttention):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"{path} is a {kind}, and what it computes is not known here: use torch.nn.MultiheadAttention itself"
            )
        _check(module, queries_per_group)
    for module in found.values():
        module.__class__ = GroupedMultiheadAttention
        vars(module)["queries_per_group"] = queries_per_group
    return decoder


def _check(module: nn.MultiheadAttention, queries_per_group: int) -> None:
    """Check that a module can attend inside groups of so many queries.

    Raises:
        ValueError: if it cannot.
    """
    if type(queries_per_group) is not int or queries_per_group < 1:
        raise ValueError(f"queries_per_group must be an integer of at least 1, got {queries_per_group!r}")
    options = {
        "kdim or vdim": not module._qkv_same_embed_dim,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
    }
    used = [option for option, on in options.items() if on]
    if used:
        raise ValueError(f"attention inside groups has no {used[0]} of torch.nn.MultiheadAttention")
