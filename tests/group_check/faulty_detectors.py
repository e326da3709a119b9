"""A small detector with groups of queries, and the faults that public implementations of Group DETR have had."""

import torch
from torch import nn
from torch.nn import functional as F

DIM, HEADS, CLASSES = 16, 2, 4


class SelfAttention(nn.Module):
    """Self-attention of ``[B, K * N, d]``, inside each group in training mode; one group otherwise."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))

    def split(self, states):
        """``[B, K * N, d]`` to ``[K * B, N, d]``."""
        return torch.cat(states.chunk(self.groups, dim=1)) if self.training else states

    def join(self, states, batch):
        return torch.cat(states.split(batch), dim=1) if self.training else states

    def attend(self, query, key, value):
        query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def forward(self, content):
        states = self.split(content)
        return self.join(self.attend(self.query(states), self.key(states), self.value(states)), len(content))


class AllQueriesTogether(SelfAttention):
    """detrex's first Group DETR: queries, keys and values of all groups were put back side by side before attention, so
    that every query attended to those of every group (IDEA-Research/detrex, issue 163).
    """

    def split(self, states):
        return states

    def join(self, states, batch):
        return states


class ShapeFromBeforeTheSplit(SelfAttention):
    """LW-DETR in transformers before 5.4: groups were moved into the batch, but the views for attention took the shape
    from before, so that groups and images were mixed (huggingface/transformers, pull request 44441).
    """

    def forward(self, content):
        states = self.split(content)
        shape = content.shape
        return self.attend(*(layer(states).view(shape) for layer in (self.query, self.key, self.value)))


class BatchAndSequenceExchanged(SelfAttention):
    """An attention module that expects ``[L, B, d]`` gets ``[B, L, d]``: every query attends to the other images."""

    def forward(self, content):
        states = self.split(content).transpose(0, 1)
        attended = self.attend(self.query(states), self.key(states), self.value(states))
        return self.join(attended.transpose(0, 1), len(content))


class DetachedMean(SelfAttention):
    """Queries are centred by the mean of all, without a gradient: only a change shows it."""

    def forward(self, content):
        return super().forward(content - content.detach().mean(dim=1, keepdim=True))


class NormOverQueries(SelfAttention):
    """A batch norm over all queries of all groups and images."""

    def __init__(self, groups):
        super().__init__(groups)
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, content):
        return self.norm(super().forward(content).transpose(1, 2)).transpose(1, 2)


class Interleaved(SelfAttention):
    """A sound one, of which query q belongs to group q modulo K."""

    def split(self, states):
        if not self.training:
            return states
        return states.unflatten(1, (-1, self.groups)).movedim(2, 0).flatten(0, 1)

    def join(self, states, batch):
        return states.unflatten(0, (-1, batch)).movedim(0, 2).flatten(1, 2) if self.training else states


class SmallDetector(nn.Module):
    """Image -> tokens -> cross-attention, then self-attention of learned queries -> logits and boxes.

    In training mode with targets there are denoising queries, made from them, which stand first and are cut off;
    ``mask_denoising=False`` lets the groups see them.
    """

    def __init__(self, attention=SelfAttention, groups=3, queries=5, mask_denoising=True, heads_of_groups=False):
        super().__init__()
        self.groups, self.queries = groups, queries
        self.mask_denoising = mask_denoising
        self.backbone = nn.Conv2d(3, DIM, 8, stride=8)
        self.query_embed = nn.Embedding(groups * queries, DIM)
        self.attention = attention(groups)
        self.interleaved = attention is Interleaved
        self.cross = nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.class_embed, self.bbox_embed = nn.Linear(DIM, CLASSES), nn.Linear(DIM, 4)
        nn.init.zeros_(self.bbox_embed.weight)  # as in DETR: boxes depend on no query at first
        self.encoder_heads = nn.ModuleList(nn.Linear(DIM, CLASSES) for _ in range(groups)) if heads_of_groups else None
        self.label_embed = nn.Embedding(CLASSES, DIM)

    def forward(self, images, targets=None):
        memory = self.backbone(images).flatten(2).transpose(1, 2)
        queries = self.query_embed.weight
        if not self.training:
            queries = queries[:: self.groups] if self.interleaved else queries[: self.queries]
        content = self.dropout(queries.expand(len(images), -1, -1))
        if self.training and targets is not None and not self.mask_denoising:
            denoising = torch.stack([self.label_embed(target["labels"][0]) for target in targets])
            content = content + denoising[:, None]
        content = content + self.cross(content, memory, memory, need_weights=False)[0]
        content = content + self.attention(content)
        out = {"pred_logits": self.class_embed(content), "pred_boxes": self.bbox_embed(content).sigmoid()}
        if self.training:
            out["of_training"] = content
        if self.encoder_heads is not None:
            heads = self.encoder_heads if self.training else self.encoder_heads[:1]
            out["enc_logits"] = torch.cat([head(memory[:, : self.queries]) for head in heads], dim=1)
        return out


def targets_of(images=2):
    return [{"labels": torch.tensor([index, 2]), "boxes": torch.rand(2, 4) * 0.3 + 0.2} for index in range(images)]


def loss_of(outputs, groups):
    """A loss that matches the first query of each group, to be summed by whoever takes it."""
    rows = outputs["pred_boxes"].unflatten(1, (groups, -1))[:, :, 0]
    return {"loss_ce": outputs["pred_logits"].square().mean(), "loss_bbox": rows.square().sum()}


def sound():
    torch.manual_seed(0)
    return SmallDetector()


def mixed_groups():
    torch.manual_seed(0)
    return SmallDetector(AllQueriesTogether)


def with_inputs():
    """A detector, a batch of which it needs more than images, and its loss."""
    torch.manual_seed(0)
    model = SmallDetector()

    def loss(outputs):
        return loss_of(outputs, model.groups if model.training else 1)

    return model, (torch.randn(2, 3, 32, 32), targets_of()), loss


def no_model():
    return "nothing"


def broken():
    raise RuntimeError("no weights\nand more")
