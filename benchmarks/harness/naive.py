"""What one writes in plain PyTorch where this package has an op."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from groupdetr_fast import QueryGroups
from groupdetr_fast.boxes import cxcywh_to_xyxy, pairwise_generalized_box_iou


@functools.lru_cache(maxsize=4)
def block_mask(groups: QueryGroups, device: torch.device) -> Tensor:
    return groups.attention_mask(device)


def explicit_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: QueryGroups, *, dropout_p: float = 0.0
) -> Tensor:
    """Attention of all queries ``[B, L, H, D]`` to all, of which the mask leaves those of the same group."""
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~block_mask(groups, query.device), float("-inf"))
    probabilities = scores.softmax(-1)
    if dropout_p:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.einsum("bhlm,bmhd->blhd", probabilities, value)


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, groups: QueryGroups, *, dropout_p: float = 0.0) -> Tensor:
    """The same by torch's fused attention, which keeps no scores but computes all of them."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    mask = block_mask(groups, query.device)
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)


def folded_sdpa(query: Tensor, key: Tensor, value: Tensor, groups: QueryGroups, *, dropout_p: float = 0.0) -> Tensor:
    """The same without a mask: groups as if they were images. Not possible with denoising queries."""
    if groups.denoising_length:
        raise NotImplementedError("denoising queries see other queries too, so that groups cannot be folded")
    folded = (x.unflatten(1, (groups.num_groups, -1)).flatten(0, 1).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*folded, dropout_p=dropout_p).transpose(1, 2)
    return out.unflatten(0, (len(query), -1)).flatten(1, 2)


def padded_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    *,
    dropout_p: float = 0.0,
    widen_values: bool = False,
) -> Tensor:
    """Attention to images by torch's fused attention under a mask of their padding, as in DETR's repositories.

    ``widen_values`` adds zeros to the values until their heads are as wide as those of the keys.
    """
    size = value.shape[-1]
    if widen_values:
        value = F.pad(value, (0, key.shape[-1] - size))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if padding is None else ~padding[:, None, None]
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)
    return out[..., :size]


def cross_image_cost(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
    """The matching cost of the DETR family's matchers: every query of a batch with every target of the batch.

    Args:
        logits: ``[B, Q, C]``.
        boxes: ``[B, Q, 4]``.
        labels: ``[T]`` of all images.
        target_boxes: ``[T, 4]``.

    Returns:
        ``[B * Q, T]``, of which the blocks of one image are used.
    """
    probability = logits.flatten(0, 1).sigmoid()
    boxes = boxes.flatten(0, 1)
    absent = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    present = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    focal = present[:, labels] - absent[:, labels]
    l1 = torch.cdist(boxes, target_boxes, p=1)
    giou = pairwise_generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return 2 * focal + 5 * l1 - 2 * giou
