"""Which detections are kept: of which classes, and from which score on."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..models.postprocess import check_selection
from ..spelling import did_you_mean
from ..yaml_files import read_yaml
from .settings import InferenceSettings

__all__ = ["Classes", "Selection", "Thresholds"]

Classes: TypeAlias = str | int | Sequence[str | int]
Thresholds: TypeAlias = str | os.PathLike[str] | Mapping[str | int, float | None]

SUFFIXES = (".json", ".yaml", ".yml")
MOST_NAMES = 20  # of classes in a message
NEVER = float("inf")  # the threshold of a class that is not wanted


@dataclass(frozen=True)
class Selection:
    """The scores from which detections are kept.

    Attributes:
        score_threshold: of classes without one of their own.
        classes: the labels that are wanted; None for all.
        thresholds: those of single classes, by label.
    """

    score_threshold: float
    classes: frozenset[int] | None = None
    thresholds: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(
        cls,
        settings: InferenceSettings,
        num_classes: int | None,
        score_threshold: float,
        classes: Classes | None = None,
        class_thresholds: Thresholds | None = None,
    ) -> "Selection":
        """What a user asks for.

        Args:
            settings: the names of the classes.
            num_classes: how many the detector has; None if that is not known.
            score_threshold: of all classes.
            classes: names, or numbers as in ``detection["labels"]``; several of them in one string are separated by
                commas. None for all.
            class_thresholds: by name or number, where None stands for ``score_threshold``; or as one string,
                ``"person=0.3,car=0.5"``; or the path of a json or yaml file with such a table.

        Raises:
            ValueError: for a class that there is not, a threshold outside [0, 1], and a table that is none.
        """
        check_selection(1, score_threshold)
        names = _Names(settings, num_classes)
        wanted = None
        if classes is not None:
            wanted = frozenset(label for each in _split(classes, names) for label in names.labels(each))
            if not wanted:
                raise ValueError("classes must name at least one class; leave it out for all of them")
        given = {} if class_thresholds is None else _table(class_thresholds)
        thresholds: dict[int, float] = {}
        for name, value in given.items():
            labels = names.labels(name)
            if value is not None:
                thresholds |= dict.fromkeys(labels, _threshold(name, value))
        return cls(score_threshold, wanted, tuple(sorted(thresholds.items())))

    @property
    def least(self) -> float:
        """The lowest score that a detection which is kept may have."""
        own = [value for label, value in self.thresholds if self.classes is None or label in self.classes]
        others = self.classes is None or bool(self.classes - {label for label, _ in self.thresholds})
        return min([*own, self.score_threshold] if others else own)

    def for_postprocess(self, num_classes: int) -> float | Tensor:
        """What ``postprocess`` takes as ``score_threshold``: a number, or ``[C]`` where classes differ."""
        if self.classes is None and not self.thresholds:
            return self.score_threshold
        values = torch.full((num_classes,), self.score_threshold)
        for label, threshold in self.thresholds:
            if label < num_classes:
                values[label] = threshold
        if self.classes is not None:
            wanted = torch.tensor([label in self.classes for label in range(num_classes)])
            values[~wanted] = NEVER
        return values


class _Names:
    """The classes of a detector, by the names that a user may know them under."""

    def __init__(self, settings: InferenceSettings, num_classes: int | None):
        self.names = settings.class_names
        known = len(self.names) if num_classes is None else num_classes
        self.count = known or None
        self.by_name: dict[str, list[int]] = {}
        for label, name in enumerate(self.names):
            self.by_name.setdefault(name, []).append(label)
        if settings.category_ids is not None:  # names that several categories have are told apart by these
            for label, (name, category) in enumerate(zip(self.names, settings.category_ids, strict=True)):
                if len(self.by_name[name]) > 1:
                    self.by_name[f"{name} ({category})"] = [label]

    def labels(self, name: Any) -> list[int]:
        """The labels of a name or a number; a text of digits that is no name is a number."""
        if isinstance(name, str):
            found = self.by_name.get(name) or self.by_name.get(name.strip())
            if found:
                return found
            if not name.strip().isdecimal():
                raise ValueError(self._unknown(name))
            name = int(name)
        if isinstance(name, bool) or not isinstance(name, int):
            raise ValueError(f"a class is a name or a number, got {name!r}")
        if name < 0 or (self.count is not None and name >= self.count):
            limit = "must not be negative" if self.count is None else f"must be in [0, {self.count})"
            raise ValueError(f"there is no class {name}: the number of a class {limit}")
        return [name]

    def _unknown(self, name: str) -> str:
        if not self.names:
            return f"there is no class {name!r}: the checkpoint has no names of classes; give their numbers"
        shown = list(self.by_name)[:MOST_NAMES]
        more = len(self.by_name) - len(shown)
        known = f": there are {', '.join(shown)}" + (f", and {more} more" if more else "")
        return f"there is no class {name!r}{did_you_mean(name, self.by_name, otherwise=known)}"


def _split(classes: Classes, names: _Names) -> Sequence[str | int]:
    if isinstance(classes, str):
        return [classes] if classes in names.by_name else [each for each in classes.split(",") if each.strip()]
    if isinstance(classes, int):
        return [classes]
    if not isinstance(classes, Iterable):
        raise ValueError(f"classes must be names or numbers, got {classes!r}")
    return list(classes)


def _table(thresholds: Thresholds) -> Mapping[Any, Any]:
    if isinstance(thresholds, Mapping):
        return thresholds
    if isinstance(thresholds, os.PathLike) or str(thresholds).lower().endswith(SUFFIXES):
        return _read(Path(thresholds))
    pairs = [each.rpartition("=") for each in str(thresholds).split(",") if each.strip()]
    if not pairs or not all(name.strip() and equals for name, equals, _ in pairs):
        raise ValueError(
            f"class_thresholds must look like person=0.3,car=0.5 or be a json or yaml file, got {str(thresholds)!r}"
        )
    return {name.strip(): value for name, _, value in pairs}


def _read(path: Path) -> Mapping[Any, Any]:
    is_json = path.suffix.lower() == ".json"
    try:
        content = json.loads(path.read_text()) if is_json else read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"class_thresholds: there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = f"{path} cannot be read ({error})" if is_json else str(error)
        raise ValueError(f"class_thresholds: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"class_thresholds: {path} must hold a table of classes and their thresholds")
    return content


def _threshold(name: Any, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise ValueError(f"the threshold of class {name!r} must be in [0, 1], got {value!r}")
    return number
