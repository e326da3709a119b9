import pytest
import torch

from groupdetr_fast import QueryGroups
from groupdetr_fast.ops.grouped_attention.cpu import denoising_parts, group_part

LAYOUTS = [
    QueryGroups(1, 1),
    QueryGroups(3, 4),
    QueryGroups(1, 5, 2, 3),
    QueryGroups(3, 2, 4, 1),
    QueryGroups(3, 2, 2, 3, denoising_scope="every"),
]


def _role(groups, index):
    """(kind, set or group, denoising group) of a query, told without QueryGroups' own properties."""
    size = groups.queries_per_denoising_group
    sets = 0 if groups.denoising_groups == 0 else (1 if groups.denoising_scope == "first" else groups.num_groups)
    if index < sets * groups.denoising_groups * size:
        number, group = divmod(index // size, groups.denoising_groups)
        return "denoising", number, group
    return "matching", (index - sets * groups.denoising_groups * size) // groups.queries_per_group, None


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_attention_mask_says_who_sees_whom(groups):
    mask = groups.attention_mask()
    assert mask.shape == (groups.length, groups.length)
    for row in range(groups.length):
        for column in range(groups.length):
            query, key = _role(groups, row), _role(groups, column)
            same_segment = query == key
            own_group = query[0] == "denoising" and key[0] == "matching" and query[1] == key[1]
            assert mask[row, column] == (same_segment or own_group), (row, column)


def test_mask_written_out():
    groups = QueryGroups(2, 1, denoising_groups=2, queries_per_denoising_group=1)
    expected = [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert groups.attention_mask().int().tolist() == expected
    every = QueryGroups(2, 1, 1, 1, denoising_scope="every")
    assert every.attention_mask().int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_segments_hold_every_query_once_and_see_two_ranges_at_most(groups):
    rows = [row for start, stop, _ in groups.segments for row in range(start, stop)]
    assert rows == list(range(groups.length))
    for _, _, key_ranges in groups.segments:
        bounds = [bound for key_range in key_ranges for bound in key_range]
        assert len(key_ranges) <= 2
        assert bounds == sorted(bounds)
        assert all(start < stop for start, stop in key_ranges)


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_parts_of_the_cpu_kernel_cover_the_mask_exactly_once(groups):
    parts = [group_part(groups), *(denoising_parts(groups) if groups.denoising_length else ())]
    count = torch.zeros(groups.length, groups.length, dtype=torch.int64)
    for part in parts:
        for i in range(part.count):
            row, key = part.row + i * part.rows, part.key + i * part.keys
            count[row : row + part.rows, key : key + part.keys] += 1
    assert torch.equal(count, groups.attention_mask().long())


@pytest.mark.parametrize("groups", LAYOUTS, ids=str)
def test_as_ints_round_trip(groups):
    assert QueryGroups.from_ints(groups.as_ints()) == groups


def test_lengths_and_group_range():
    groups = QueryGroups(3, 4, 2, 5, denoising_scope="every")
    assert (groups.denoising_sets, groups.denoising_length, groups.matching_length, groups.length) == (3, 30, 12, 42)
    assert [groups.group_range(g) for g in range(3)] == [(30, 34), (34, 38), (38, 42)]
    assert QueryGroups(3, 4).denoising_sets == 0
    for group in (-1, 3):
        with pytest.raises(ValueError, match="group must be in"):
            groups.group_range(group)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_groups must be at least 1, got 0"),
        ((1, 0), "queries_per_group must be at least 1, got 0"),
        ((1, 1, -1, 1), "must not be negative"),
        ((1, 1, 0, 2), "both zero or both positive"),
        ((1, 1, 2, 0), "both zero or both positive"),
        ((1, 1, 1, 1, "last"), "denoising_scope must be one of"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        QueryGroups(*arguments)


@pytest.mark.parametrize("arguments", [(3.0, 4), ("3", 4), (3, 4.0), (3, 4, 1.0, 2)])
def test_sizes_that_are_no_integers_are_refused(arguments):
    with pytest.raises(TypeError, match=r"must be an integer, got '?\d"):
        QueryGroups(*arguments)
