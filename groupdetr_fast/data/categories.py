"""Tables of categories: the classes of their labels, and how two of them differ."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

__all__ = ["CategoryDifference", "category_differences", "class_table", "difference_in_words"]

MOST_TOLD = 3
LONGEST_NAME = 40  # characters


def class_table(categories: Sequence[Mapping[str, Any]], labels: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of the classes, by label.

    Args:
        categories: COCO's entries, ascending by id.
        labels: "contiguous" or "category_id", see ``CocoDataset``; in the second mode, labels that are the id of no
            category have their number as name.
    """
    names = {category["id"]: str(category["name"]) for category in categories}
    ids = tuple(names) if labels == "contiguous" else tuple(range(max(names, default=-1) + 1))
    return tuple(names.get(category_id, str(category_id)) for category_id in ids), ids


class CategoryDifference(NamedTuple):
    """A category in which two tables differ.

    Attributes:
        number: its id.
        first: its name in the first table; None if it is not there.
        second: its name in the second table; None if it is not there.
    """

    number: int
    first: str | None
    second: str | None

    def told(self, first: str, second: str) -> str:
        """The difference in words, for tables that are called ``first`` and ``second``."""
        begin = _begin_of_difference(self.first, self.second)
        cut = [name and ("..." if begin else "") + name[begin : begin + LONGEST_NAME] for name in self[1:]]
        names = [None if name is None else repr(name) for name in cut]
        if None not in names:
            return f"category {self.number} is {names[0]} in {first} and {names[1]} in {second}"
        where, other = (second, first) if names[0] is None else (first, second)
        return f"category {self.number}, {names[0] or names[1]}, is in {where} and not in {other}"


def category_differences(first: Mapping[int, str], second: Mapping[int, str]) -> list[CategoryDifference]:
    """The categories that one of two tables lacks or has under another name, ascending by id.

    Args:
        first, second: names by id.
    """
    numbers = sorted(first.keys() | second.keys())
    found = (CategoryDifference(number, first.get(number), second.get(number)) for number in numbers)
    return [each for each in found if each.first != each.second]


def difference_in_words(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], called: tuple[str, str]
) -> str | None:
    """How two tables of COCO's category entries differ, the first few of their differences; None if they do not.

    Args:
        first, second: entries with "id" and "name".
        called: what to call the tables, such as ("the checkpoint", "the data").
    """
    names, others = ({entry["id"]: entry["name"] for entry in table} for table in (first, second))
    found = category_differences(names, others)
    if not found:
        return None
    more = f"; and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return "; ".join(each.told(*called) for each in found[:MOST_TOLD]) + more


def _begin_of_difference(first: str | None, second: str | None) -> int:
    """From which character on to show two names, so that what is shown differs."""
    if first is None or second is None or first[:LONGEST_NAME] != second[:LONGEST_NAME]:
        return 0
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in alike) - LONGEST_NAME // 2
