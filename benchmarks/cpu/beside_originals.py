"""The code that the authors published beside ours, on one batch: outputs, losses and the gradient of every parameter.

    git clone https://github.com/IDEA-Research/DINO
    OMP_NUM_THREADS=1 python benchmarks beside_originals dino --original DINO

Ours begins with the weights that the original draws, moved away from their zeros and ones, by gd.load_checkpoint. Both
train on the same images of different sizes, one of them without objects, with the original's own model, matcher, losses
and default settings; the backbone is a small one, a copy of ours, unless --backbone says otherwise; dropout is off, and
denoising queries get the same draws. Both compute in float64. Afterwards both detect in evaluation mode.

What is changed in an original:

- its compiled deformable attention (MSDeformAttnFunction) is the PyTorch function of its repository's tests;
- the generalised IoU of IDEA's repositories, which add 1e-6 to both denominators, is torchvision's, unless
  --published-giou is given;
- DAB-DETR and DN-DETR get as many classes as ours has, and an encoder with as many channels where that is not 256;
- what it asks for in float32 is float64, and what on a GPU is on the CPU;
- for a new torch, torch._overrides and _LinearWithBias are what has other names today, and its attention does not hand
  itself to what watches torch's functions (has_torch_function is False);
- nothing downloads weights (is_main_process is False); packages for data, evaluation and logs are left out.
"""

import argparse
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import groupdetr_fast as gd
from cpu.originals.conditional_detr import conditional_detr, group_detr
from cpu.originals.conditions import Noise, in_doubles
from cpu.originals.dab_deformable_detr import dab_deformable_detr
from cpu.originals.dab_detr import dab_detr
from cpu.originals.dino import dino
from cpu.originals.dn_detr import dn_detr
from cpu.originals.original import Original, predictions
from groupdetr_fast.models.checkpoints.original import original_keys
from harness.commits import commit_of

__all__ = ["ORIGINALS", "Difference", "build_both", "compare", "parameter_pairs"]

CLASSES = 91  # which the originals fix
# The sine embeddings of the originals are made for 256 channels.
SIZES = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 3, "dim_feedforward": 64, "num_queries": 12}
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "small": {"backbone": "conv:8-16-24-32"},
    "resnet50": {"backbone": "resnet50"},
    "resnet50_dc5": {"backbone": "resnet50", "dilation": True},
}
IMAGES = ((96, 128), (64, 112), (80, 72))  # height and width
OBJECTS = (4, 0, 7)
MOVED = 0.05  # standard deviation of what is added to the weights that an original draws
# A gradient is 0 but for rounding if it is this small in both codes, relative to the largest of all: those of biases
# of keys, on which no attention depends, and of what multiplies contents that are 0.
ZERO = 1e-12
# Differences of others are relative at least to this share of the largest: some with a ResNet are sums that cancel.
SMALLEST = 1e-6
LARGEST_DIFFERENCE = 1e-9
KINDS = {
    "prediction": "predictions",
    "loss": "losses",
    "gradient": "gradients",
    "zero": "gradients that are 0 but for rounding",
    "evaluation": "in evaluation mode",
}


@dataclass(frozen=True)
class _Pair:
    """An original and its rebuilt form.

    Attributes:
        build: makes the original, given a checkout and ours, whose sizes it gets.
        model: the name of ours.
        settings: of ours, where they differ.
        guarded_giou: whether the original adds 1e-6 to the denominators of its generalised IoU.
        denoising_groups: where the original has always this number of them, ours gets as many queries as make it.
        selection: what ours needs to detect as many objects as the original; nothing where its default does so.
    """

    build: Callable[..., Original]
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    guarded_giou: bool = True
    denoising_groups: int | None = None
    selection: Mapping[str, int] = field(default_factory=lambda: {"top_k": 300})


ORIGINALS = {
    "group_detr": _Pair(group_detr, "conditional_detr_r50", {"num_groups": 3}, guarded_giou=False, selection={}),
    "conditional_detr": _Pair(conditional_detr, "conditional_detr_r50", guarded_giou=False, selection={}),
    "dab_detr": _Pair(dab_detr, "dab_detr_r50"),
    "dn_detr": _Pair(dn_detr, "dn_detr_r50", denoising_groups=5),
    "dab_deformable_detr": _Pair(dab_deformable_detr, "dab_deformable_detr_r50", selection={}),
    "dino": _Pair(dino, "dino_4scale_r50"),
}


@dataclass(frozen=True)
class Difference:
    """How far the two are apart in something.

    Attributes:
        kind: one of :data:`KINDS`.
        what: its name in this package.
        largest: of the original's values.
        relative: the largest difference, relative to that; of gradients, at least to :data:`SMALLEST` of the largest
            gradient of all, and of those that are 0 to all of it.
    """

    kind: str
    what: str
    largest: float
    relative: float

    @classmethod
    def of(cls, kind: str, what: str, ours: Tensor, theirs: Tensor, smallest: float = 0.0) -> "Difference":
        if ours.shape != theirs.shape:
            raise ValueError(f"{what}: ours has the shape {list(ours.shape)}, the original {list(theirs.shape)}")
        largest = theirs.detach().abs().max().item()
        difference = (ours - theirs).detach().abs().max().item()
        if not math.isfinite(difference):
            raise ValueError(f"{what}: not all values are finite")
        scale = max(largest, smallest)
        return cls(kind, what, largest, difference / scale if scale else math.inf if difference else 0.0)


def build_both(
    name: str, folder: Path, *, published_giou: bool = False, backbone: str = "small", **sizes: Any
) -> tuple[Any, Original]:
    """Ours and the original, each with the weights that it draws.

    Args:
        name, folder, published_giou, backbone: as of :func:`compare`.
        sizes: of ours, which the original gets too, where they are to differ from :data:`SIZES`.
    """
    pair = ORIGINALS[name]
    plain = {"plain_giou": True} if pair.guarded_giou and not published_giou else {}
    settings = {**SIZES, "dropout": 0.0, "num_groups": 1, **pair.settings, **BACKBONES[backbone], **sizes}
    ours = gd.build_model(pair.model, num_classes=CLASSES, **settings).double()
    return ours, pair.build(folder, ours, **plain).double()


def compare(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    published_giou: bool = False,
    backbone: str = "small",
    objects: Sequence[int] = OBJECTS,
) -> list[Difference]:
    """Compare an original with ours.

    Args:
        name: one of :data:`ORIGINALS`.
        folder: checkout of its repository.
        seed: of the weights, the images, the objects and the noise.
        published_giou: leave the original what it adds to the denominators of its generalised IoU.
        backbone: one of :data:`BACKBONES`; but for the small one, of which the original has a copy, of either code.
        objects: of each of the three images.

    Returns:
        Predictions layer by layer, losses, gradients of parameters, those that are 0 apart; and, in evaluation mode,
        predictions and detections.

    Raises:
        ValueError: if the folder is no such checkout, weights do not fit, one of the two has something that the other
            lacks, or one draws denoising noise from another range.
    """
    pair, sizes = ORIGINALS[name], {}
    if pair.denoising_groups is not None:
        sizes["denoising_queries"] = pair.denoising_groups * max(*objects, 1)
    with in_doubles():
        torch.manual_seed(seed)
        ours, theirs = build_both(name, folder, published_giou=published_giou, backbone=backbone, **sizes)
        _move(theirs.net, keep=() if backbone == "small" else ("backbone.",))
        gd.load_checkpoint(ours, theirs.net.state_dict(), num_groups=ours.config.num_groups)
        images, masks, targets = _batch(objects)
        copies = 2 * getattr(ours.config, "denoising_queries", 0)  # of one object, with DINO's negatives
        noise = Noise(objects, copies, CLASSES, torch.Generator().manual_seed(seed))
        step = list(_training(ours.train(), theirs.train(), images, masks, targets, noise))
        return step + list(_evaluation(ours.eval(), theirs.eval(), images, masks, pair.selection))


@torch.no_grad()
def _move(net: nn.Module, keep: tuple[str, ...]) -> None:
    """Move parameters away from zeros and ones, and so the buffers of frozen norms.

    Args:
        net: the original.
        keep: starts of the names of parameters that stay: those of a deep network are random, and explode beyond it.
    """
    for name, parameter in net.named_parameters():
        if not name.startswith(keep):
            parameter.add_(torch.randn_like(parameter), alpha=MOVED)
    for module in net.modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.weight.uniform_(0.3, 0.7)  # without which 16 residual blocks add up
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)


def _batch(objects: Sequence[int]) -> tuple[Tensor, Tensor, gd.PackedTargets]:
    """Images, their padding, and objects, which lie anywhere and may reach out of the image."""
    height, width = (max(sides) for sides in zip(*IMAGES, strict=True))
    images = torch.zeros(len(IMAGES), 3, height, width)
    masks = torch.ones(len(IMAGES), height, width, dtype=torch.bool)
    for image, mask, (rows, columns) in zip(images, masks, IMAGES, strict=True):
        image[:, :rows, :columns] = torch.randn(3, rows, columns)
        mask[:rows, :columns] = False
    targets = [
        {
            "labels": torch.randint(CLASSES, (number,)),
            "boxes": torch.cat((torch.rand(number, 2), 0.05 + 0.5 * torch.rand(number, 2)), dim=1),
        }
        for number in objects
    ]
    return images, masks, gd.PackedTargets.from_list(targets)


def _training(
    ours: nn.Module, theirs: Original, images: Tensor, masks: Tensor, targets: gd.PackedTargets, noise: Noise
) -> Iterator[Difference]:
    """Predictions, losses and gradients of a step."""
    with noise.concatenated():
        their_predictions, out = theirs.detect(images, masks, targets)
    with noise.packed():
        output = ours(images, masks, targets)
    yield from _by_layer("prediction", _predictions(output), their_predictions)
    losses, their_losses = gd.build_criterion(ours)(output, targets), theirs.losses(out, targets)
    if output.denoising is None:  # whose losses ours then has not, and the originals as zeros
        their_losses = {loss: value for loss, value in their_losses.items() if "_dn" not in loss or value}
    _require_same(losses, their_losses)
    yield from (Difference.of("loss", loss, losses[loss], their_losses[loss]) for loss in losses)
    losses["loss"].backward()
    their_losses["loss"].backward()
    yield from _gradients(ours, theirs.net)


def _predictions(output: gd.DetectorOutput) -> dict[str, Tensor]:
    """All predictions of ours: ``[layers, B, Q, ...]``, or ``[B, Q, ...]`` of the encoder."""
    found = {"logits": output.logits, "boxes": output.boxes}
    if output.denoising is not None:
        found |= {"denoising logits": output.denoising.logits, "denoising boxes": output.denoising.boxes}
    if output.encoder is not None:
        found |= {"encoder logits": output.encoder.logits, "encoder boxes": output.encoder.boxes}
    return found


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if alone := sorted(set(ours) ^ set(theirs)):
        raise ValueError(f"one of the two alone has {', '.join(alone)}")


def _by_layer(kind: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[Difference]:
    _require_same(ours, theirs)
    for name, value in ours.items():
        if value.dim() == 3:
            yield Difference.of(kind, name, value, theirs[name])
            continue
        if len(value) != len(theirs[name]):
            raise ValueError(f"{name}: ours are of {len(value)} layers, the original's of {len(theirs[name])}")
        for layer, pair in enumerate(zip(value, theirs[name], strict=True)):
            yield Difference.of(kind, f"{name}, layer {layer}", *pair)


def parameter_pairs(ours: nn.Module, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of ours by its name, with that of the original; neither has one that the other lacks."""
    keys_of = original_keys(ours)
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    pairs = {}
    for name, parameter in ours.named_parameters():
        same = {id(parameters[key]): parameters[key] for key in keys_of(name) if key in parameters}
        if len(same) != 1:
            raise ValueError(f"the original has {len(same)} parameters for {name}")
        pairs[name] = (parameter, next(iter(same.values())))
    seen = {id(theirs) for _, theirs in pairs.values()}
    if alone := [name for name, parameter in theirs.named_parameters() if id(parameter) not in seen]:
        raise ValueError(f"the original alone has {', '.join(alone)}")
    return pairs


def _gradients(ours: nn.Module, theirs: nn.Module) -> Iterator[Difference]:
    """Gradients of all parameters, zeros last; parameters that have none count as having zeros."""
    gradients = {name: tuple(map(_gradient, pair)) for name, pair in parameter_pairs(ours, theirs).items()}
    largest = max(other.abs().max().item() for _, other in gradients.values())
    zeros = {name for name, pair in gradients.items() if all(each.abs().max() <= ZERO * largest for each in pair)}
    for kind, share in (("gradient", SMALLEST), ("zero", 1.0)):
        for name, pair in gradients.items():
            if (kind == "zero") == (name in zeros):
                yield Difference.of(kind, name, *pair, share * largest)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _evaluation(
    ours: nn.Module, theirs: Original, images: Tensor, masks: Tensor, selection: Mapping[str, int]
) -> Iterator[Difference]:
    """Predictions without denoising queries, of one group; and detections of images that have the sizes in pixels."""
    output, out = ours(images, masks), theirs(images, masks)
    own = {"logits": output.logits, "boxes": output.boxes}
    yield from _by_layer("evaluation", own, predictions(out))
    expected = theirs.after(out, torch.tensor(IMAGES))
    found = gd.postprocess(output, IMAGES, **selection)
    for name in ("scores", "labels", "boxes"):
        both = (torch.cat([image[name] for image in images]).double() for images in (found, expected))
        yield Difference.of("evaluation", f"{name} of detections", *both)


def _rows(differences: Iterable[Difference], *, every: bool) -> Iterator[tuple[str, float, float]]:
    """What, its largest value, its relative difference; gradients by parts of the model, unless every one is wanted."""

    def title(each: Difference) -> str:
        kind = "gradient, 0 but for rounding, relative to the largest" if each.kind == "zero" else each.kind
        return f"{kind}: {each.what.split('.')[0] if 'gradient' in kind and not every else each.what}"

    for text, together in itertools.groupby(differences, title):
        members = list(together)
        if len(members) > 1:
            text += f", {len(members)} parameters"
        yield text, max(each.largest for each in members), max(each.relative for each in members)


_kind, _relative = operator.attrgetter("kind"), operator.attrgetter("relative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ORIGINALS, help="which of them")
    parser.add_argument("--original", type=Path, required=True, help="checkout of its repository")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images, objects and noise")
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="small", help="of either code; a small one is ours in both"
    )
    parser.add_argument(
        "--published-giou", action="store_true", help="leave the original the 1e-6 that it adds in its generalised IoU"
    )
    parser.add_argument("--every", action="store_true", help="a row for every parameter's gradient")
    arguments = parser.parse_args()
    if arguments.published_giou and not ORIGINALS[arguments.name].guarded_giou:
        sys.exit(f"error: {arguments.name} adds nothing in its generalised IoU: leave out --published-giou")
    settings = {
        "seed": arguments.seed,
        "published_giou": arguments.published_giou,
        "backbone": arguments.backbone,
    }
    try:
        differences = compare(arguments.name, arguments.original, **settings)
    except ValueError as fault:
        sys.exit(f"error: {fault}")
    if at := commit_of(arguments.original):
        print(f"{arguments.name} at commit {at}\n")
    print("| | largest value | largest difference, each relative to the largest value of its tensor |")
    print("|---|---|---|")
    for what, largest, relative in _rows(differences, every=arguments.every):
        print(f"| {what} | {largest:.4g} | {relative:.0e} |")
    worst = max(differences, key=_relative)
    if worst.relative > LARGEST_DIFFERENCE:
        sys.exit(
            f"error: they differ, most in the {worst.kind} {worst.what}, by {worst.relative:.0e} of its largest value"
        )
    largest = (
        f"{KINDS[kind]} {max(map(_relative, group)):.0e}"
        for kind, group in itertools.groupby(differences, _kind)
        if kind != "zero"
    )
    kinds = [each.kind for each in differences]
    zeros, gradients = kinds.count("zero"), kinds.count("zero") + kinds.count("gradient")
    print(f"\nThe same. Largest differences: {', '.join(largest)}.")
    print(f"{zeros} of {gradients} gradients are 0 in both but for rounding.")
