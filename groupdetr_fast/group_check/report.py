"""The result of a check, for programs and for people."""

import math
from dataclasses import dataclass, field
from typing import Any

from .evaluation_loss import EvaluationLoss
from .leaks import Leak

__all__ = ["GroupReport", "OutputReport"]


@dataclass(frozen=True)
class OutputReport:
    """What was measured of an output in training mode. Everything must be exactly 0; None was not measured.

    Attributes:
        name: its place among the outputs, such as ``aux_outputs.0.pred_boxes``.
        shape: with the batch of the check.
        group_gradient: the largest gradient, in absolute value, from one group's rows to the queries of another.
        group_change: the largest change of a group's rows when the queries of another are exchanged.
        image_gradient, image_change: the same between images and pixels.
        target_change: the largest change when the targets are exchanged, which denoising queries alone may see.
        own_gradient: the largest gradient to queries, of any group: what would leak is not 0.
    """

    name: str
    shape: tuple[int, ...]
    group_gradient: float | None = None
    group_change: float | None = None
    image_gradient: float | None = None
    image_change: float | None = None
    target_change: float | None = None
    own_gradient: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """The result of :func:`groupdetr_fast.check_groups`; as a text by ``str``.

    Attributes:
        model: its name.
        num_groups: K; 1 if the model shows no groups, so that only images could be compared.
        queries_per_group: N; None if the model shows no groups.
        evaluation_group: the group that evaluation mode uses; None where it uses several, or there are none.
        parameters: the names of those that belong to groups.
        outputs: what was measured of each.
        not_checked: outputs and parameters of which something could not be checked, with the reason.
        evaluation_loss: what the loss of evaluation mode matches; None where that could not be counted.
        notes: what else one should know, a sentence each.
        faults: what is wrong, a sentence each.
    """

    model: str
    num_groups: int
    queries_per_group: int | None
    evaluation_group: int | None
    parameters: tuple[str, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    not_checked: dict[str, str] = field(default_factory=dict)
    evaluation_loss: EvaluationLoss | None = None
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The report as an object of json; numbers that json has not are texts."""
        content = _plain(self)
        if self.evaluation_loss is not None:
            content["evaluation_loss"]["is_of_one_group"] = self.evaluation_loss.is_of_one_group
        return {"ok": self.ok, **content}

    def __str__(self) -> str:
        lines = [self._first_line()]
        if self.parameters:
            lines.append(f"queries and heads of groups: {', '.join(_families(self.parameters))}")
        lines += ["", *self._table()]
        if self.evaluation_loss is not None:
            lines += ["", _loss_line(self.evaluation_loss)]
        if self.not_checked:
            lines += ["", "not checked:", *(f"  {name}: {reason}" for name, reason in self.not_checked.items())]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        lines += ["", *(f"fault: {fault}" for fault in self.faults)]
        if self.ok:
            lines.append("no group sees another" if self.num_groups > 1 else "no image sees another")
        return "\n".join(lines)

    def _first_line(self) -> str:
        if self.queries_per_group is None:
            return f"{self.model}: one group of queries"
        text = f"{self.model}: {self.num_groups} groups of {self.queries_per_group} queries"
        return text if self.evaluation_group is None else f"{text}; evaluation uses group {self.evaluation_group}"

    def _table(self) -> list[str]:
        heads = ("output", "shape", "between groups", "", "between images", "", "targets")
        rows: list[tuple[str, ...]] = [heads, ("", "", "gradient", "change", "gradient", "change", "change")]
        for each in self.outputs:
            numbers = (each.group_gradient, each.group_change, each.image_gradient, each.image_change)
            shape = " x ".join(map(str, each.shape))
            rows.append((each.name, shape, *map(_shown, numbers), _shown(each.target_change)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _loss_line(loss: EvaluationLoss) -> str:
    text = (
        f"loss of evaluation mode: {loss.value:.4g}, by {loss.matched_evaluation} matched queries ({loss.output}); "
        f"training mode matches {loss.matched_training}"
    )
    return text if loss.one_group is None else f"{text}; the loss of one group is {loss.one_group:.4g}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _families(names: tuple[str, ...]) -> list[str]:
    """The names of their modules, those that differ in numbers alone as one."""
    owners = (name.removesuffix(".weight").removesuffix(".bias") for name in names)
    starred = (".".join("*" if part.isdigit() else part for part in name.split(".")) for name in owners)
    return list(dict.fromkeys(starred))


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe_leak(leak: Leak | None) -> str:
    """Its numbers in words."""
    if leak is None:
        return "nothing"
    parts = [(leak.gradient, "gradient"), (leak.change, "change")]
    return ", ".join(f"{name} {_shown(value)}" for value, name in parts if value)
