"""K groups of queries in Ultralytics' RT-DETR (Group DETR, section 3.2), while it trains.

As in LW-DETR, every group has an encoder output projection and heads of its own, which pick its queries; the decoder is
shared. Denoising queries see themselves and group 0, as in the base model. Evaluation is that of group 0 by
Ultralytics' own code, and what is saved has group 0 alone.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.nn.tasks import RTDETRDetectionModel

from ..multihead import attend_in_groups
from . import criterion as criteria
from .exchange import SavedAsTheirs, set_class

__all__ = ["HEADS", "OTHERS", "add_groups", "has_groups", "heads_of_others", "remove_groups"]

OTHERS = "other_groups"  # name of the module that holds the heads of all groups but the first
HEADS = ("enc_output", "enc_score_head", "enc_bbox_head", "tgt_embed")  # the last with learnt_init_query alone


def add_groups(model: RTDETRDetectionModel, num_groups: int, *, noise: float | None = None) -> None:
    """Let a model train with K groups, in place.

    Group 0 keeps the model's heads. Those of the others are copies, of which either the encoder output projections and
    learned contents are drawn anew, so that each group picks queries of its own from the beginning, or every weight is
    near that of group 0.

    Args:
        model: as Ultralytics made it, or accelerated.
        num_groups: K, at least 1; with 1 the model stays as it is.
        noise: standard deviation of normal noise on copies of a trained group 0, relative to that of the values of
            each tensor; None for a model that is trained from scratch.

    Raises:
        ValueError: if ``num_groups`` is below 1.
        TypeError: if the model or a part of it is of a subclass.
    """
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if num_groups == 1:
        return
    head = model.model[-1]
    attentions = [layer.self_attn for layer in head.decoder.layers]
    for part, classes in ((model, (RTDETRDetectionModel, criteria.AcceleratedModel)), (head, (RTDETRDecoder,))):
        if type(part) not in classes:
            raise TypeError(f"groups need a {classes[0].__name__} itself, got a {type(part).__name__}")
    if any(type(attention) is not nn.MultiheadAttention for attention in attentions):
        raise TypeError("groups need the decoder's self-attention to be a torch.nn.MultiheadAttention itself")
    setattr(head, OTHERS, nn.ModuleList(_heads_of_a_group(head, noise) for _ in range(num_groups - 1)))
    set_class(model, _GroupedModel)
    set_class(head, _GroupedHead)
    for attention in attentions:
        set_class(attention, _GroupedAttention)
        attention.num_groups = num_groups
    if getattr(model, "criterion", None) is not None:
        model.criterion = None  # which the next loss makes again


def remove_groups(model: RTDETRDetectionModel) -> None:
    """Undo :func:`add_groups` in place, keeping group 0; without it nothing changes."""
    if not has_groups(model):
        return
    head = model.model[-1]
    set_class(model, RTDETRDetectionModel)
    set_class(head, RTDETRDecoder)
    delattr(head, OTHERS)
    for layer in head.decoder.layers:
        set_class(layer.self_attn, nn.MultiheadAttention)
        del layer.self_attn.num_groups
    if getattr(model, "criterion", None) is not None:
        model.criterion = None


def has_groups(model: nn.Module) -> bool:
    return type(model) is _GroupedModel


def heads_of_others(model: nn.Module) -> nn.ModuleList:
    """The heads of all groups but the first."""
    return getattr(model.model[-1], OTHERS)


def _heads_of_a_group(head: RTDETRDecoder, noise: float | None) -> nn.ModuleDict:
    heads = nn.ModuleDict({name: copy.deepcopy(getattr(head, name)) for name in HEADS if hasattr(head, name)})
    with torch.no_grad():
        if noise is None:
            heads["enc_output"][0].reset_parameters()
            drawn = [heads["enc_output"][0].weight]
            drawn += [heads["tgt_embed"].weight] if "tgt_embed" in heads else []
            for weight in drawn:
                nn.init.xavier_uniform_(weight)
        else:
            for parameter in heads.parameters():
                parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    return heads


class _Grouped(SavedAsTheirs):
    """Cannot go on as a module without groups."""

    def take_class(self, cls: type) -> None:
        raise TypeError(f"a model with groups of queries cannot take the class {cls.__name__}: remove its groups first")


class _GroupedModel(_Grouped, criteria.AcceleratedModel):
    def init_criterion(self) -> nn.Module:
        criterion = super().init_criterion()
        if not criteria.is_exchanged(criterion):
            raise ValueError(criteria.NOT_IN_GROUPS)
        criterion.num_groups = len(heads_of_others(self)) + 1
        return criterion.train(self.training)  # which tells how many groups there are

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Their own; a checkpoint, which has one group, leaves the others as they are."""
        others = {name: value for name, value in self.state_dict().items() if f".{OTHERS}." in name}
        return super().load_state_dict({**others, **state_dict}, *args, **kwargs)


class _GroupedHead(_Grouped, RTDETRDecoder):
    theirs = RTDETRDecoder
    unsaved = frozenset({OTHERS})

    def forward(self, x: list[Tensor], batch: Mapping[str, Any] | None = None) -> Any:
        out = super().forward(x, batch)
        if self.training and (denoising := out[-1]) is not None:  # of which Ultralytics' loss reads where they end
            length = denoising["dn_num_split"][0]
            denoising["dn_num_split"] = [length, out[0].shape[2] - length]
        return out

    def _get_decoder_input(
        self, feats: Tensor, shapes: list[list[int]], dn_embed: Tensor | None = None, dn_bbox: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Contents, reference boxes, and boxes and logits of the encoder, of one group after the other."""
        parts = [super()._get_decoder_input(feats, shapes, dn_embed, dn_bbox)]
        if self.training:
            for heads in getattr(self, OTHERS):
                view = copy.copy(self)
                set_class(view, RTDETRDecoder)
                view._modules = self._modules | dict(heads.items())
                parts.append(view._get_decoder_input(feats, shapes))
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


class _GroupedAttention(_Grouped, nn.MultiheadAttention):
    """Denoising queries and group 0 attend as in the base model, to each other by its mask; the others follow them."""

    theirs = nn.MultiheadAttention
    unsaved = frozenset({"num_groups"})
    num_groups: int

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Of ``[L, B, d]`` queries, the first of which are those of the base model: as many as the mask is for."""
        if not self.training:
            return super().forward(query, key, value, attn_mask=attn_mask, **options)
        first = len(query) // self.num_groups if attn_mask is None else len(attn_mask)
        (own_query, query), (own_key, key), (own_value, value) = ((x[:first], x[first:]) for x in (query, key, value))
        base, _ = super().forward(own_query, own_key, own_value, attn_mask=attn_mask, need_weights=False, **options)
        return torch.cat((base, attend_in_groups(self, query, key, value, self.num_groups - 1))), None
