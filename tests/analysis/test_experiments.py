"""Which runs a measurement is made of."""

import math
import statistics
from dataclasses import replace

import pytest
from scipy import stats

from groupdetr_fast.analysis.experiments import (
    VARIANTS,
    ablation_cells,
    assignment_cells,
    average,
    group_cells,
    paired_differences,
    with_groups,
)
from groupdetr_fast.analysis.run import Run


def layout(config):
    return config.model.num_groups, config.model.num_queries, config.assignment, config.positives


def names(cells):
    return {Run(cell.training, 0.7).name for cell in cells}


def test_the_rows_of_table_7(training):
    cells = ablation_cells(replace(training, model=replace(training.model, num_groups=3)), [7])
    assert {cell.labels["variant"]: layout(cell.training) for cell in cells} == {
        "one group": (1, 5, "group", None),
        "neither (naive one-to-many)": (1, 15, "one_to_many", 3),
        "separate self-attention only": (3, 5, "one_to_many", None),
        "group assignment only": (1, 15, "group", 3),
        "both (Group DETR)": (3, 5, "group", None),
    }
    assert list(VARIANTS) == [cell.labels["variant"] for cell in cells]


def test_figure_1_compares_at_equal_numbers_of_queries(training):
    cells = assignment_cells(training, (1, 4), [7])
    assert [(cell.labels["assignment"], cell.labels["queries"]) for cell in cells] == [
        (assignment, queries) for queries in (5, 20) for assignment in ("one_to_one", "one_to_many", "group")
    ]
    for cell in cells:
        assert cell.training.model.num_groups * cell.training.model.num_queries == cell.labels["queries"]
    assert [layout(cell.training) for cell in cells[3:]] == [
        (1, 20, "group", None),
        (1, 20, "one_to_many", 4),
        (4, 5, "group", None),
    ]


@pytest.mark.parametrize("lr_drop", [(1,), None], ids=["drop given", "drop by the epochs"])
def test_measurements_share_runs(training, lr_drop):
    """With one group, all assignments are the same run; and figure 1, table 1 and table 7 have runs in common."""
    training = replace(training, model=replace(training.model, num_groups=4))
    training = replace(training, optimization=replace(training.optimization, lr_drop=lr_drop))
    figure_1, table_1 = assignment_cells(training, (1, 4), [7]), group_cells(training, (1, 4), (), [7])
    assert len(names(figure_1)) == 4
    assert names(table_1) < names(figure_1)
    assert len(names(ablation_cells(training, [7])) - names(figure_1)) == 2


def test_runs_are_told_apart_by_every_setting(training):
    run = Run(training, 0.7)
    assert run.name.startswith("k02-n5-group-e2-s7-")
    assert Run(replace(training, output=training.output / "other", resume=True), 0.7).name == run.name
    assert Run(with_groups(training, 2, separate=False, assignment="one_to_many"), 0.7).name.startswith(
        "k01-n10-one-to-many-p2-e2-s7-"
    )
    assert Run(replace(training, top_k=50), 0.7).name != run.name


def test_more_epochs_for_one_group(training):
    cells = group_cells(training, (1, 2), (2, 5), [7, 8])
    assert [(c.labels["num_groups"], c.labels["epochs"], c.labels["seed"]) for c in cells] == [
        (1, 2, 7), (2, 2, 7), (1, 5, 7), (1, 2, 8), (2, 2, 8), (1, 5, 8),
    ]  # fmt: skip
    longer = cells[2].training.optimization
    assert (longer.epochs, longer.lr_drop, longer.seed) == (5, (4,), 7)  # the rates drop one epoch before the end
    free = replace(training, optimization=replace(training.optimization, lr_drop=None, epochs=1))
    assert group_cells(free, (1,), (36,), [7])[1].training.optimization.drops == (33,)


def test_the_number_of_queries_is_the_models_own_unless_given(training):
    config = with_groups(replace(training, model=replace(training.model, num_queries=None)), 2, separate=False)
    assert config.model.num_queries == 600


def test_mean_and_sample_standard_deviation():
    rows = [
        {"k": 1, "AP": 0.1},
        {"k": 3, "AP": 0.5},
        {"k": 1, "AP": 0.4},
        {"k": 1, "AP": math.nan},
        {"k": 5, "AP": None},
    ]
    one, three, five = average(rows, ("k",), ("AP",))
    assert average(rows[:1], ("k",), (), counted="queries") == [{"k": rows[0]["k"], "queries": 1}]
    assert one == {"k": 1, "runs": 3, "AP": pytest.approx(0.25), "AP_std": pytest.approx(statistics.stdev([0.1, 0.4]))}
    assert three == {"k": 3, "runs": 1, "AP": 0.5, "AP_std": None}
    assert five == {"k": 5, "runs": 1, "AP": None, "AP_std": None}


def test_differences_are_paired_by_seed():
    """Against scipy's paired test; a seed without its partner does not count, nor does a run without the number."""
    baseline, own = [0.30, 0.34, 0.28, 0.33, 0.31], [0.33, 0.35, 0.33, 0.34, 0.35]
    rows = [
        {"num_groups": groups, "seed": seed, "AP": value}
        for groups, values in ((1, baseline), (3, own))
        for seed, value in enumerate(values)
    ]
    rows += [{"num_groups": 3, "seed": 9, "AP": 0.9}, {"num_groups": 5, "seed": 2, "AP": 0.5}]
    rows += [{"num_groups": 7, "seed": 0, "AP": math.nan}, {"num_groups": 7, "seed": 1, "AP": None}]
    rows += [{"num_groups": 9, "seed": 9, "AP": 0.9}]
    three, five, seven = paired_differences(rows, ("num_groups",), (1,), ("AP",))
    interval = stats.ttest_rel(own, baseline).confidence_interval(0.95)
    assert (three["num_groups"], three["seeds"]) == (3, 5)
    assert three["AP_difference"] == pytest.approx(statistics.mean(own) - statistics.mean(baseline))
    assert (three["AP_from"], three["AP_to"]) == pytest.approx((interval.low, interval.high))
    assert five == {
        "num_groups": 5, "seeds": 1, "AP_difference": pytest.approx(0.22), "AP_from": None, "AP_to": None
    }  # fmt: skip
    assert (seven["seeds"], seven["AP_difference"], seven["AP_to"]) == (2, None, None)


def test_without_a_baseline_there_are_no_differences():
    assert paired_differences([{"num_groups": 3, "seed": 0, "AP": 0.1}], ("num_groups",), (1,), ("AP",)) == []
