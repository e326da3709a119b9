"""A detector of transformers that is called as the detectors of this package are."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..groups import QueryGroups, rows_near_first_group
from ..integrations.transformers import accelerate, add_groups
from ..models.detector import check_batch
from ..models.output import DetectorOutput
from ..targets import PackedTargets
from .criterion import LossInputs, TransformersCriterion
from .families import FAMILIES, size_multiple

__all__ = ["TransformersConfig", "TransformersDetector", "TransformersOutput"]

# Without the projections of LW-DETR, RF-DETR and DEIMv2, which are not pretrained with the backbone.
_BACKBONE = re.compile(r"model\.model\.(backbone\.(?!projector\.)|conv_encoder\.(model|backbone)\.)")
_LEARNED_QUERIES = re.compile(
    r"model\.model\.(query_position_embeddings|query_refpoint_embeddings|query_feat|reference_point_embed)\."
)
_QUERIES = ("query_position_embeddings", "query_refpoint_embeddings")  # which add_groups gives more rows
_OTHER_GROUPS = "groupdetr_fast.other_groups"  # where a state dict has the rows that transformers would not know


@dataclass(frozen=True)
class TransformersConfig:
    """Sizes of a detector of transformers, which has all others in its own configuration.

    Attributes:
        num_classes: C.
        num_groups: K, groups of queries in training.
        num_queries: N, queries of one group.
        predicts_masks: never. No setting.
    """

    predicts_masks: ClassVar[bool] = False

    num_classes: int
    num_groups: int
    num_queries: int


@dataclass
class TransformersOutput(DetectorOutput):
    """Predictions of the last decoder layer, and what the loss is computed from.

    Attributes:
        loss_inputs: arguments of transformers' loss; None where the model was given no targets, or is not in training
            mode.
    """

    loss_inputs: LossInputs | None = None


class TransformersDetector(nn.Module):
    """Takes images, padding and targets as :class:`~groupdetr_fast.models.detector.Detector` does.

    Frames are enlarged to the multiple of pixels that the architecture needs, and boxes of architectures without masks
    are converted, so that images of any size can be detected in, in one batch. Boxes are relative to each image without
    its padding, as everywhere in this package.

    The state dict has the names of transformers, and tied weights once: ``from_pretrained`` reads it. Groups beyond the
    first are kept under a name of their own, which transformers leaves out.

    Args:
        model: one of :data:`~.families.FAMILIES`; changed in place.
        processor: content of its ``preprocessor_config.json``.
        num_groups: K; above 1 only where ``integrations.transformers.add_groups`` can add them, or of LW-DETR and
            RF-DETR, which have ``group_detr``.
        accelerate_kernels: whether the model computes with the kernels of this package, where there are any.

    Attributes:
        model: the model of transformers.
        config: sizes.

    Raises:
        ValueError: for a number of groups that the model cannot have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Mapping[str, Any],
        *,
        num_groups: int = 1,
        accelerate_kernels: bool = True,
    ):
        super().__init__()
        self.family = FAMILIES[model.config.model_type]
        self.processor = dict(processor)
        self.model = model
        model.config.architectures = [type(model).__name__]
        if self.family.groups == "own":
            _require_groups(model, num_groups, int(model.config.group_detr))
        elif self.family.groups is None:
            _require_groups(model, num_groups, 1)
        elif num_groups > 1:
            add_groups(cast(Any, model), num_groups)
        for name, parameter in model.named_parameters():
            if name.endswith(".mask_token"):  # of DINOv2's own training; without a gradient DDP would wait for one
                parameter.requires_grad_(False)
        if accelerate_kernels and self.family.accelerates:
            accelerate(model)
        self.loss_function = model.loss_function
        self._recorder = _Recorder()
        model.loss_function = self._recorder
        self._multiple = size_multiple(json.loads(model.config.to_json_string(use_diff=False)))
        classes, queries = (cast(int, getattr(model.config, name)) for name in ("num_labels", "num_queries"))
        self.config = TransformersConfig(classes, num_groups, queries)

    @property
    def decoder(self) -> nn.Module:
        """The decoder, whose ``layers`` training may compute again to save memory."""
        return self.model.model.decoder

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        targets: PackedTargets | None = None,
        *,
        num_groups: int | None = None,
        inference_group: int = 0,
    ) -> TransformersOutput:
        """Detect.

        Args:
            images: ``[B, 3, H, W]``, normalised as the model expects.
            masks: ``[B, H, W]`` bool, True on padding; None if no image is padded.
            targets: what is to be found, in training mode; needed for the loss.
            num_groups: None, or the number of groups that the mode has: all in training mode, one in evaluation mode.
            inference_group: the group to use in evaluation mode, of groups that were added.

        Returns:
            The predictions of the last layer.

        Raises:
            ValueError: for a number of groups or a group that the model does not have, for labels that are no classes
                of the model, for a shape that does not fit, and for images with fewer places than the model chooses for
                its queries.
            TypeError: if ``targets`` are not packed, images are not floating point, or masks not bool.
        """
        check_batch(images, masks, targets if self.training else None)
        self._check_groups(num_groups, inference_group)
        frame, padding = self._frame(images, masks)
        scale = None if self.family.uses_masks else _shares(padding)
        labels = None
        if self.training and targets is not None:
            targets.check_labels(self.config.num_classes)
            labels = _labels(targets, scale)
        out = self._detect(
            pixel_values=frame, pixel_mask=(~padding).long() if self.family.uses_masks else None, labels=labels
        )
        inputs = self._recorder.take()
        if inputs is not None:
            inputs = inputs.keeping(self._unused_in(inputs))
        logits, boxes = out.logits, out.pred_boxes
        if self.training:  # denoising queries stand first
            length = getattr(out, "denoising_meta_values", None)
            length = 0 if length is None else length["dn_num_split"][0]
            logits, boxes = logits[:, length:], boxes[:, length:]
        if scale is not None:
            boxes = boxes / scale
        rows, total = logits.shape[1], self.config.num_groups if self.training else 1
        return TransformersOutput(
            logits[None],
            boxes[None],
            QueryGroups(total, rows // total),
            no_object=self.family.no_object,
            loss_inputs=inputs,
        )

    def _detect(self, **inputs: Tensor | list[dict[str, Tensor]] | None) -> Any:
        try:
            return self.model(**inputs)
        except RuntimeError as error:
            if "selected index k out of range" not in str(error):  # of torch.topk
                raise
            height, width = cast(Tensor, inputs["pixel_values"]).shape[-2:]
            raise ValueError(
                f"images of {height} x {width} pixels have fewer places than the model chooses for its "
                f"{self.config.num_queries} queries: give it larger images"
            ) from error

    def make_criterion(self) -> TransformersCriterion:
        """The losses that transformers computes for this model."""
        return TransformersCriterion(self.loss_function, self.family, self.model.config, self.config.num_groups)

    def is_backbone(self, name: str) -> bool:
        """Whether the parameter with this name is trained at the backbone's learning rate."""
        return _BACKBONE.match(name) is not None

    def is_query(self, name: str) -> bool:
        """Whether the parameter with this name holds learned queries."""
        return _LEARNED_QUERIES.match(name) is not None

    @torch.no_grad()
    def start_groups_near_first(self, noise: float, *, trained: int = 1) -> None:
        """Let groups that were added begin as copies of group 0 with noise; see ``models.Detector``.

        Args:
            noise: standard deviation of the noise, relative to that of the queries of group 0.
            trained: groups, the first ones, that stay as they are.

        Raises:
            ValueError: if the noise is negative, or the groups are the model's own.
        """
        if self.family.groups == "own":
            raise ValueError(
                f"the groups of {type(self.model).__name__} are its own and trained: group_init_noise is for new ones"
            )
        if (name := self._grouped()) is None:
            return
        # Not the module's weight, which shows those of one group in evaluation mode.
        rows = self.model.state_dict(keep_vars=True)[name]
        rows.copy_(rows_near_first_group(rows, self.config.num_groups, noise, trained))

    def name_classes(self, names: Sequence[str]) -> None:
        """Set the names of the classes that the model's own configuration has.

        Raises:
            ValueError: if there are not as many as classes.
        """
        if len(names) != self.config.num_classes:
            raise ValueError(f"expected {self.config.num_classes} names of classes, got {len(names)}")
        config = self.model.config
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's header needs to build the model: plain values."""
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        return {"config": config, "processor": self.processor}

    def files(self) -> dict[str, str]:
        """What ``from_pretrained`` of transformers needs beside the weights, by the name of the file."""
        described = self.describe()
        return {
            "config.json": json.dumps(described["config"], indent=2) + "\n",
            "preprocessor_config.json": json.dumps(described["processor"], indent=2) + "\n",
        }

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights under the names of transformers, tied ones once; all share the memory of the parameters."""
        state = self.model.state_dict(keep_vars=keep_vars)
        for name in self._tied():
            state.pop(name, None)
        if (grouped := self._grouped()) is not None:
            rows = state[grouped]
            state[grouped], state[_OTHER_GROUPS] = rows[: self.config.num_queries], rows[self.config.num_queries :]
        destination = {} if destination is None else destination
        destination.update({f"{prefix}{name}": tensor for name, tensor in state.items()})
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` gave, of this number of groups or another one.

        Groups that the state does not have keep their queries; those that the model does not have are left out.
        """
        state = dict(state_dict)
        others = state.pop(_OTHER_GROUPS, None)
        name = self._grouped()
        if name is not None and name in state:
            own = self.model.state_dict()[name]
            loaded = state[name] if others is None else torch.cat((state[name], others.to(state[name])))
            loaded = loaded[: len(own)]
            state[name] = torch.cat((loaded, own[len(loaded) :].to(loaded)))
        state |= {target: state[source] for target, source in self._tied().items() if source in state}
        return self.model.load_state_dict(state, strict=strict, assign=assign)

    def _tied(self) -> dict[str, str]:
        """For each name of a tied weight, the name that the weight is kept under; chains are followed to their end."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        ends = {}
        for target in tied:
            source = target
            while source in tied:
                source = tied[source]
            ends[target] = source
        return ends

    def _grouped(self) -> str | None:
        """Name of the queries to which groups were added."""
        if self.family.groups != "added" or self.config.num_groups == 1:
            return None
        return next(f"model.{name}.weight" for name in _QUERIES if hasattr(self.model.model, name))

    def _check_groups(self, num_groups: int | None, inference_group: int) -> None:
        used = self.config.num_groups if self.training else 1
        if num_groups not in (None, used):
            raise ValueError(f"num_groups must be {used} in this mode of a model of transformers, got {num_groups}")
        grouped = self._grouped()
        total = self.config.num_groups if grouped is not None else 1
        if not 0 <= inference_group < total:
            raise ValueError(f"inference_group must be in [0, {total}), got {inference_group}")
        if grouped is not None:
            cast(Any, self.model.get_submodule(grouped.removesuffix(".weight"))).inference_group = inference_group

    def _frame(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images and their padding in a frame of a size that the model can have."""
        height, width = images.shape[-2:]
        full = [-(-side // self._multiple) * self._multiple for side in (height, width)]
        if self.family.square_frames:
            full = [max(full)] * 2
        if masks is None:
            masks = images.new_zeros(images[:, 0].shape, dtype=torch.bool)
        missing = (0, full[1] - width, 0, full[0] - height)
        if any(missing):
            images, masks = F.pad(images, missing), F.pad(masks, missing, value=True)
        return images, masks

    def _unused_in(self, inputs: LossInputs) -> Iterable[Tensor]:
        """Weights that the loss of a batch does not depend on: without objects, those of denoising queries."""
        embedding = getattr(self.model.model, "denoising_class_embed", None)
        if embedding is None or inputs.keywords.get("denoising_meta_values") is not None:
            return ()
        return embedding.parameters()


class _Recorder:
    """Stands in for a model's loss, which knows nothing of the step: keeps its arguments, for the criterion."""

    def __init__(self) -> None:
        self._inputs: LossInputs | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[None, None, None]:
        self._inputs = LossInputs(arguments, keywords)
        return None, None, None

    def take(self) -> LossInputs | None:
        """What came last, once."""
        inputs, self._inputs = self._inputs, None
        return inputs


def _require_groups(model: PreTrainedModel, num_groups: int, own: int) -> None:
    if num_groups != own:
        groups = "one group" if own == 1 else f"the {own} groups"
        raise ValueError(f"{type(model).__name__} trains with {groups} of queries that it has: set num_groups to {own}")


def _shares(padding: Tensor) -> Tensor:
    """Shares of the frame that images take, ``[B, 1, 4]`` as x, y, x, y; images lie in the upper left corner."""
    inside = ~padding
    width, height = inside[:, 0].sum(1), inside[:, :, 0].sum(1)
    return torch.stack((width / padding.shape[2], height / padding.shape[1]), 1).repeat(1, 2)[:, None]


def _labels(targets: PackedTargets, scale: Tensor | None) -> list[dict[str, Tensor]]:
    """Targets as transformers has them; their sizes are known on the host, so that nothing waits for the device."""
    boxes = targets.boxes if scale is None else targets.boxes * scale
    return [
        {"class_labels": targets.labels[index, :size], "boxes": boxes[index, :size]}
        for index, size in enumerate(targets.sizes)
    ]
