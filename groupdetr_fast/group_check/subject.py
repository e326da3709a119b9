"""What is checked: a model, two batches for it, and its loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .nested import find_tensors, first_image, replace_tensors

__all__ = ["Inputs", "Subject", "in_short", "make_images", "make_targets", "other_targets", "subject_of_module"]

OBJECTS = (3, 2, 1)  # of the images of a batch, over and over


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model's ``forward``.

    Attributes:
        args, kwargs: in both modes.
        training: further ones in training mode.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def images(self) -> list[Tensor]:
        """The tensors that hold images: floating point, of three dimensions or more."""
        tensors = find_tensors((self.args, dict(self.kwargs))).values()
        return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() >= 3]

    def with_images(self, change: Callable[[Tensor, int], Tensor]) -> "Inputs":
        """The same inputs with other images; ``change`` gets an image tensor and its number among them."""
        numbers = {id(tensor): number for number, tensor in enumerate(self.images())}

        def replace(tensor: Tensor) -> Tensor:
            return change(tensor, numbers[id(tensor)]) if id(tensor) in numbers else tensor

        return Inputs(replace_tensors(self.args, replace), replace_tensors(dict(self.kwargs), replace), self.training)

    def single(self, batch_size: int) -> "Inputs":
        """The first image alone."""
        args = tuple(first_image(each, batch_size) for each in self.args)
        kwargs, training = (
            {name: first_image(each, batch_size) for name, each in given.items()}
            for given in (self.kwargs, self.training)
        )
        return Inputs(args, kwargs, training)


@dataclass(kw_only=True)
class Subject:
    """A model to be checked.

    Attributes:
        name: for the report.
        model: it.
        inputs: a batch of at least two images.
        single: its first image alone.
        retargeted: the same images with other targets, which only denoising queries may feel; None without targets.
        loss: what the losses add up to, of the outputs; None if the outputs hold it, or there is none. A module is
            put into the mode of the model.
        one_group_loss: the loss of evaluation as it should be, where that can be computed otherwise.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    single: Inputs
    retargeted: Inputs | None = None
    loss: Callable[[Any], Any] | None = None
    one_group_loss: Callable[[], float] | None = None

    @property
    def batch_size(self) -> int:
        images = self.inputs.images()
        return len(images) if images[0].dim() == 3 else images[0].shape[0]

    def forward(self, inputs: Inputs) -> Any:
        """The outputs in the mode that the model is in.

        Raises:
            ValueError: if the model fails.
        """
        further = inputs.training if self.model.training else {}
        try:
            return self.model(*inputs.args, **{**inputs.kwargs, **further})
        except Exception as error:  # of foreign code
            mode = "training" if self.model.training else "evaluation"
            raise ValueError(f"{self.name} fails in {mode} mode on the check's batch: {in_short(error)}") from error

    def loss_of(self, outputs: Any) -> Tensor | None:
        """The loss of outputs; None if there is none."""
        if self.loss is None:
            held = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            return held if isinstance(held, Tensor) and held.numel() == 1 else None
        if isinstance(self.loss, nn.Module):
            self.loss.train(self.model.training)
        value = self.loss(outputs)
        if isinstance(value, Mapping):
            losses = [each for each in value.values() if isinstance(each, Tensor) and each.requires_grad]
            value = sum(losses) if losses else None
        return value if isinstance(value, Tensor) else None


def in_short(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def subject_of_module(
    model: nn.Module,
    inputs: Any = None,
    loss: Callable[[Any], Any] | None = None,
    *,
    name: str | None = None,
    batch_size: int,
    image_size: tuple[int, int],
) -> Subject:
    """A model of anybody's.

    Args:
        inputs: arguments of ``forward``: one, a tuple of them, or a dictionary by name; None for images
            ``[B, 3, H, W]`` alone.
        loss: of the outputs.

    Raises:
        ValueError: if the inputs have no images, or one image only.
    """
    if inputs is None:
        inputs = make_images(batch_size, image_size, model)
    given = _as_inputs(inputs)
    name = type(model).__name__ if name is None else name
    if not given.images():
        raise ValueError(f"the inputs of {name} hold no images: tensors [B, 3, H, W] of floats, or a list of [3, H, W]")
    changed = Inputs(other_targets(given.args), other_targets(dict(given.kwargs)))
    subject = Subject(name=name, model=model, inputs=given, single=given, loss=loss)
    if subject.batch_size < 2:
        raise ValueError(f"the inputs of {name} hold one image: at least two are needed, since one may see another")
    subject.single = given.single(subject.batch_size)
    if changed.args is not given.args or any(changed.kwargs[key] is not each for key, each in given.kwargs.items()):
        subject.retargeted = changed
    return subject


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Mapping):
        return Inputs(kwargs=inputs)
    return Inputs(args=inputs if isinstance(inputs, tuple) else (inputs,))


def make_images(batch_size: int, image_size: tuple[int, int], model: nn.Module) -> Tensor:
    """Noise ``[B, 3, H, W]`` in the dtype and on the device of the model."""
    example = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    return torch.randn(batch_size, 3, *image_size, dtype=example.dtype, device=example.device)


def make_targets(
    batch_size: int, num_classes: int, device: torch.device, labels: str = "labels"
) -> list[dict[str, Tensor]]:
    """Random targets of some objects an image: class indices under ``labels``, and ``boxes`` ``[T, 4]``, cxcywh."""
    counts = [OBJECTS[index % len(OBJECTS)] for index in range(batch_size)]
    return [
        {
            labels: torch.randint(num_classes, (count,), device=device),
            "boxes": torch.cat((torch.rand(count, 2) * 0.5 + 0.2, torch.rand(count, 2) * 0.2 + 0.1), dim=1).to(device),
        }
        for count in counts
    ]


def other_targets(value: Any) -> Any:
    """The same nesting with every target of the DETR family's form replaced by another of as many objects.

    A target is a mapping with ``boxes`` and ``labels`` or ``class_labels``. Its boxes are mirrored, its classes
    exchanged; ``value`` itself is returned where there is none.
    """
    if isinstance(value, Mapping):
        labels = next((name for name in ("labels", "class_labels") if isinstance(value.get(name), Tensor)), None)
        boxes = value.get("boxes")
        if labels is not None and isinstance(boxes, Tensor) and boxes.dim() == 2 and len(boxes):
            mirrored = torch.cat((1 - boxes[:, :2], boxes[:, 2:]), dim=1)
            classes = value[labels]
            return {**value, "boxes": mirrored, labels: classes.min() + classes.max() - classes}
    if isinstance(value, Mapping | list | tuple):
        children: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else dict(enumerate(value))
        changed = {name: other_targets(child) for name, child in children.items()}
        if all(changed[name] is child for name, child in children.items()):
            return value
        return changed if isinstance(value, Mapping) else type(value)(changed.values())
    return value
