"""From csv files to goals, tables and plots."""

import pytest

from cpu import summary
from cpu.summary import ATTENTION, ENCODER, GOALS, MANY_GROUPS, ONE_GROUP, goals_table
from harness.documents import read_section, significant, write_section
from harness.interleave import Timing
from harness.memory import Peak
from harness.results import OURS, ResultWriter


@pytest.fixture
def folder(tmp_path):
    results = ResultWriter(tmp_path)
    timings = {
        OURS: Timing(seconds=[1.0, 1.0, 1.0]),
        "masked SDPA": Timing(seconds=[8.0, 10.0, 12.0]),
        "folded SDPA": Timing(seconds=[0.9, 0.99, 1.5]),
        "FlexAttention": Timing("missing", "no backward"),
    }
    results.add_timings("grouped_attention", ATTENTION, ATTENTION.num_groups, timings)
    deformable = {OURS: Timing(seconds=[1.0]), "grid_sample": Timing(seconds=[2.0]), "transformers": Timing("wrong")}
    results.add_timings("ms_deform_attn", ENCODER, 0, deformable)
    for case, seconds in ((ONE_GROUP, 1.0), (MANY_GROUPS, 2.5)):
        timing = {OURS: Timing(seconds=[seconds])}
        results.add_timings("training_step_with_groups", case, case.num_groups, timing)
    for contender, size in ((OURS, 10**6), ("explicit mask", 10**8)):
        peak = Peak(bytes=size)
        results.add_memory("grouped_attention_memory", ATTENTION, ATTENTION.num_groups, contender, peak)
    results.write()
    (tmp_path / "compilation.csv").write_text("kernel,registers\nforward,32\n")  # not a comparison
    return tmp_path


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_goals(folder):
    goals = cells(goals_table(summary.SavedResults(folder)))
    attention = "attention in 11 groups of 300"
    assert goals[attention, "masked SDPA"] == ["≥ 9", "10.0 (9.00-11.0)", "met"]
    assert goals[attention, "folded SDPA"] == ["≥ 1", "0.990 (0.945-1.25)", "within the spread"]
    assert goals["deformable attention, encoder", "grid_sample"] == ["≥ 10", "2.00", "missed"]
    assert goals["deformable attention, encoder", "torch-ms-deform-attn"] == ["≥ 3", "-", "not measured"]
    assert goals["its memory", "explicit mask"] == ["≥ 8", "100", "met"]
    assert len(goals) == len(GOALS)


def test_price_of_groups_compares_with_operations(folder, monkeypatch):
    monkeypatch.setattr(summary, "step_operations", {ONE_GROUP: 100, MANY_GROUPS: 200}.get)
    measured = summary.price_of_groups(summary.SavedResults(folder))
    assert measured.median == pytest.approx(1.5)  # 150 % more time for 100 % more operations


def test_report_and_plots(folder):
    results = summary.SavedResults(folder)
    for name, rows in results.comparisons.items():
        summary.plot(name, rows, "caption", folder)
        assert (folder / f"bench_{name}.png").stat().st_size > 10_000
    report = summary.report(results, "images/")
    assert "missing: no backward" in report
    assert (
        "![Peak memory of decoder self-attention, forward and backward](images/bench_grouped_attention_memory.png)"
        in report
    )


def test_every_number_stands_beside_its_processor(folder):
    results = summary.SavedResults(folder)
    (here,) = summary.processors(results.rows)
    assert "\nOn " not in summary.report(results)
    for row in results.comparisons["ms_deform_attn"]:
        row["cpu"] = "another processor"
    report = summary.report(results)
    assert f"`make bench` on {' and '.join(sorted((here, 'another processor')))}, " in report
    sections = {part.partition("\n")[0]: part for part in report.split("## ")[1:]}
    assert "\nOn another processor.\n" in sections[summary.TITLES["ms_deform_attn"]]
    assert f"\nOn {here}.\n" in sections[summary.TITLES["grouped_attention"]]


def test_sections_of_documents(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("before\n\n<!-- a:begin -->\n\nold\n\n<!-- a:end -->\n\nafter\n")
    write_section(document, "a", "new\n\ntext\n")
    assert read_section(document, "a") == "new\n\ntext"
    assert document.read_text() == "before\n\n<!-- a:begin -->\n\nnew\n\ntext\n\n<!-- a:end -->\n\nafter\n"
    with pytest.raises(ValueError, match="must have one section b"):
        read_section(document, "b")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (99.96, "100.0"), (1234, "1234")]
)
def test_three_digits(value, text):
    assert significant(value) == text
