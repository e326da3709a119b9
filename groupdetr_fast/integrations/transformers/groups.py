"""Group training for the DETRs of Hugging Face transformers.

``add_groups`` turns a model into one that trains with K groups, under its own ``Trainer`` or any loop;
``remove_groups`` turns it back, with the weights of one group. In between the model keeps its class, its parameters'
names and its signature. Three things change: the learned queries have K * N rows, the decoder's self-attention keeps
to groups, and the loss matches all layers, images and groups at once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import (
    ConditionalDetrForObjectDetection,
    DabDetrForObjectDetection,
    DeformableDetrForObjectDetection,
    PreTrainedModel,
)
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrDecoderSelfAttention
from transformers.models.dab_detr.modeling_dab_detr import DabDetrAttention
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSelfAttention

from ... import ops
from ...groups import rows_near_first_group
from .losses import DetectionLoss
from .saved_names import load_saved_names

__all__ = ["add_groups", "remove_groups"]

Models = ConditionalDetrForObjectDetection | DabDetrForObjectDetection | DeformableDetrForObjectDetection


def add_groups(model: Models, num_groups: int, *, inference_group: int = 0, noise: float | None = None) -> Models:
    """Let a model train with K groups of queries (Group DETR, section 3.2), in place.

    Group 0 keeps the model's queries. Those of the others are drawn from the standard normal distribution, as the
    original repositories draw theirs; copies of group 0 would get the same gradients and stay copies. With ``noise``
    they are copies with noise, so that they begin where a trained group 0 has come.

    In training mode all groups take part: ``logits`` and ``pred_boxes`` have K * N rows, group-major. In evaluation
    mode only ``inference_group`` is computed, by the model's own code. What decides is the mode of the module that
    holds the queries: ``query_position_embeddings`` or, in DAB-DETR, ``query_refpoint_embeddings``. The weights of the
    decoder's self-attention are not returned for several groups: they are None.

    Call this before an optimiser or a ``Trainer`` is made, and :func:`remove_groups` before the model is saved for use:
    what a ``Trainer`` saves in between has K * N queries, which loads into a model with groups only. For that,
    ``load_state_dict`` also takes the names under which transformers saves tensors.

    Args:
        model: ``ConditionalDetrForObjectDetection``, ``DabDetrForObjectDetection`` or
            ``DeformableDetrForObjectDetection`` with learned queries.
        num_groups: K, at least 1.
        inference_group: the group that evaluation uses.
        noise: standard deviation of normal noise on copies of group 0, relative to that of its values (such as 0.1);
            None for groups that are drawn anew.

    Returns:
        The same model.

    Raises:
        TypeError: if the model is none of these.
        ValueError: if it has groups already, a loss function of its own, queries that are not learned (``two_stage``)
            or that are repeated (``num_patterns``), or a number is out of range.
    """
    queries = _queries_of(model)
    if type(num_groups) is not int or num_groups < 1:
        raise ValueError(f"num_groups must be an integer of at least 1, got {num_groups!r}")
    _check_group(inference_group, num_groups, "inference_group")
    if isinstance(queries, _GroupedQueries):
        raise ValueError(f"the model has {queries.num_groups} groups already: call remove_groups first")
    if isinstance(vars(model).get("_loss_function"), DetectionLoss):
        raise ValueError("the model is accelerated: call add_groups before accelerate, or restore first")
    if "_loss_function" in vars(model):
        raise ValueError("the model has a loss function of its own, which groups would replace: delete it first")
    size, dim = queries.weight.shape
    fresh = torch.randn((num_groups - 1) * size, dim, dtype=queries.weight.dtype, device=queries.weight.device)
    rows = torch.cat((queries.weight.detach(), fresh))
    _replace_rows(queries, rows if noise is None else rows_near_first_group(rows, num_groups, noise))
    queries.__class__ = _GroupedQueries
    queries.queries_per_group = size
    queries.inference_group = inference_group
    queries.saved_names = load_saved_names(model)
    for attention in _self_attentions_of(model):
        attention.__class__ = _GROUPED[type(attention)]
        attention.queries_per_group = size
    model.loss_function = DetectionLoss(queries_per_group=size)
    return model


def remove_groups(model: Models, group: int = 0) -> Models:
    """Undo :func:`add_groups` in place, keeping the trained weights and the queries of one group.

    The model is then as it was made by transformers, and computes exactly what it computed in evaluation mode with
    ``inference_group=group``.

    Args:
        model: a model that :func:`add_groups` changed.
        group: the group to keep, in [0, K).

    Returns:
        The same model.

    Raises:
        TypeError: if the model is none that :func:`add_groups` takes.
        ValueError: if it has no groups, or ``group`` is out of range.
    """
    queries = _queries_of(model)
    if not isinstance(queries, _GroupedQueries):
        raise ValueError("the model has no groups: call add_groups first")
    _check_group(group, queries.num_groups, "group")
    rows = queries.rows_of(group).detach().clone()
    queries.__class__ = nn.Embedding
    _replace_rows(queries, rows)
    queries.saved_names.remove()
    del queries.queries_per_group, queries.inference_group, queries.saved_names
    for attention in _self_attentions_of(model):
        attention.__class__ = type(attention).__bases__[0]
        del attention.queries_per_group
    del model._loss_function
    return model


def _queries_of(model: PreTrainedModel) -> nn.Embedding:
    if isinstance(model, DabDetrForObjectDetection):
        if model.config.num_patterns:
            raise ValueError(f"num_patterns must be 0, got {model.config.num_patterns}: patterns repeat the queries")
        return model.model.query_refpoint_embeddings
    if isinstance(model, DeformableDetrForObjectDetection) and model.config.two_stage:
        raise ValueError("two_stage must be False: a two-stage model has no learned queries, of which groups are made")
    if isinstance(model, ConditionalDetrForObjectDetection | DeformableDetrForObjectDetection):
        return model.model.query_position_embeddings
    names = [cls.__name__ for cls in Models.__args__]
    raise TypeError(f"model must be one of {', '.join(names)}, got {type(model).__name__}")


def _self_attentions_of(model: Models) -> list[nn.Module]:
    layers = model.model.decoder.layers
    if isinstance(model, DabDetrForObjectDetection):
        return [layer.self_attn.self_attn for layer in layers]
    return [layer.self_attn for layer in layers]


def _check_group(group: int, num_groups: int, name: str) -> None:
    if not 0 <= group < num_groups:
        raise ValueError(f"{name} must be in [0, {num_groups}), got {group}")


def _replace_rows(embedding: nn.Embedding, rows: Tensor) -> None:
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(rows)


class _GroupedQueries(nn.Embedding):
    """Learned queries ``[K * N, d]``, of which ``weight``, all that the models read, shows those that take part.

    As with torch's parametrisations, the class of the module is exchanged, here and in the attentions below: its
    parameters, their names, its hooks and its place in the model stay.
    """

    queries_per_group: int
    inference_group: int
    saved_names: RemovableHandle

    @property
    def num_groups(self) -> int:
        return self.num_embeddings // self.queries_per_group

    @property
    def weight(self) -> Tensor:
        every = self._parameters["weight"]
        # Shards are read by FSDP alone, which keeps what it gets; in a forward pass the rows are whole.
        if self.training or isinstance(every, DTensor):
            return every
        return self.rows_of(self.inference_group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        rows, size = state_dict.get(f"{prefix}weight"), self.queries_per_group
        if rows is not None and len(rows) != self.num_embeddings and len(rows) % size == 0:
            arguments[-1].append(  # beside torch's message, which has the shapes
                f"these are weights of {len(rows) // size} groups of {size} queries, and the model has "
                f"{self.num_groups}: call add_groups with as many (weights without groups are loaded before it)"
            )

    def rows_of(self, group: int) -> Tensor:
        start = group * self.queries_per_group
        return self._parameters["weight"][start : start + self.queries_per_group]


class _GroupedConditionalAttention(ConditionalDetrDecoderSelfAttention):
    queries_per_group: int

    def forward(self, hidden_states: Tensor, query_position_embeddings: Tensor, *args: Any, **kwargs: Any):
        if hidden_states.shape[1] == self.queries_per_group:
            return super().forward(hidden_states, query_position_embeddings, *args, **kwargs)
        query = self.q_content_proj(hidden_states) + self.q_pos_proj(query_position_embeddings)
        key = self.k_content_proj(hidden_states) + self.k_pos_proj(query_position_embeddings)
        out = _attend(self, query, key, self.v_proj(hidden_states), self.head_dim)
        return self.o_proj(out), None


class _GroupedDeformableAttention(DeformableDetrSelfAttention):
    queries_per_group: int

    def forward(self, hidden_states: Tensor, *args: Any, position_embeddings: Tensor, **kwargs: Any):
        if hidden_states.shape[1] == self.queries_per_group:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        placed = hidden_states + position_embeddings
        out = _attend(self, self.q_proj(placed), self.k_proj(placed), self.v_proj(hidden_states), self.head_dim)
        return self.o_proj(out), None


class _GroupedDabAttention(DabDetrAttention):
    queries_per_group: int

    def forward(self, hidden_states: Tensor, *args: Any, key_states: Tensor, value_states: Tensor, **kwargs: Any):
        if hidden_states.shape[1] == self.queries_per_group:
            states = {"key_states": key_states, "value_states": value_states}
            return super().forward(hidden_states, *args, **states, **kwargs)
        out = _attend(self, hidden_states, key_states, value_states, self.attention_head_dim)
        return self.output_proj(out), None


_GROUPED = {
    cls.__bases__[0]: cls for cls in (_GroupedConditionalAttention, _GroupedDeformableAttention, _GroupedDabAttention)
}


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Attention inside each group, of ``[B, K * N, d]`` queries, keys and values: ``[B, K * N, d]``."""
    query, key, value = (states.unflatten(-1, (-1, head_dim)) for states in (query, key, value))
    out = ops.grouped_attention(
        query,
        key,
        value,
        query.shape[1] // attention.queries_per_group,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    return out.flatten(-2)
