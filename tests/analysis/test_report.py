"""Files and figures of measurements."""

import csv
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from groupdetr_fast.analysis import plots
from groupdetr_fast.analysis.experiments import VARIANTS, average
from groupdetr_fast.analysis.report import ORDER, Measurement, write_measurement, write_page

USAGES = ("one_group", "all_queries", "all_queries_nms")
SEEDS = (1, 2, 3)


def aps(value):
    return {f"AP_{usage}": value + 0.01 * index for index, usage in enumerate(USAGES)}


def draw_assignment():
    rows = [
        {"assignment": assignment, "queries": queries, **aps(0.01 * seed)}
        for assignment in ("one_to_one", "one_to_many", "group")
        for queries in (5, 15)
        for seed in SEEDS
    ]
    return plots.draw_assignment(average(rows, ("assignment", "queries"), [f"AP_{usage}" for usage in USAGES]))


def draw_sweep():
    rows = [
        {"num_groups": groups, "epochs": epochs, "AP_one_group": 0.1 * seed, "minutes": 3.0 + groups}
        for groups, epochs in ((1, 4), (11, 4), (1, 5))
        for seed in SEEDS
    ]
    points = [
        {"num_groups": row["num_groups"], "epochs": row["epochs"], "epoch": epoch, "AP": 0.1}
        for row in rows
        for epoch in range(1, row["epochs"] + 1)
    ]
    keys = ("num_groups", "epochs")
    curves = average(points, (*keys, "epoch"), ("AP",))
    return plots.draw_sweep(average(rows, keys, ("AP_one_group", "minutes")), curves, 4)


def draw_ablation():
    rows = [{"variant": variant, **aps(0.1 * seed)} for variant in VARIANTS for seed in SEEDS]
    return plots.draw_ablation(average(rows, ("variant",), [f"AP_{usage}" for usage in USAGES]))


def draw_cost():
    times = {"seconds_per_step": 0.2, "seconds_per_step_p20": 0.1, "seconds_per_step_p80": 0.4}
    return plots.draw_cost([{"num_groups": groups, **times, "peak_memory_mib": 100.0} for groups in (1, 11)])


def draw_distances():
    distances = {"perturbation_distance": 0.1, "matching_distance": 0.3}
    return plots.draw_distances([{"seed": seed, "step": step, **distances} for seed in SEEDS for step in (1, 20, 40)])


def draw_reference_points():
    return plots.draw_reference_points([{"group": group, "x": 0.1, "y": 0.05 * group} for group in range(12)])


def draw_group_ap():
    return plots.draw_group_ap([{"model": f"seed {seed}", "group": g, "AP": 0.4} for seed in SEEDS for g in range(3)])


def draw_agreement():
    return plots.draw_agreement([{"step": step, "decoder": 0.9, "memory": 0.5} for step in (0, 20, 40)])


def draw_spread():
    names = ["content_first", "content_last", "content_images", "memory_images", "box_queries", "box_images", "loss"]
    spread = dict.fromkeys(names, 0.1)
    return plots.draw_spread([{"step": step, **spread} for step in (0, 20, 40)])


FIGURES = {
    "assignment": draw_assignment,
    "sweep_groups": draw_sweep,
    "ablation": draw_ablation,
    "cost": draw_cost,
    "distances": draw_distances,
    "reference_points": draw_reference_points,
    "group_ap": draw_group_ap,
    "agreement": draw_agreement,
    "spread": draw_spread,
}


@pytest.mark.parametrize("name", ORDER)
def test_every_figure_has_labelled_axes_and_fits_its_caption(name, tmp_path):
    figure = FIGURES[name]()
    plots.save_figure(figure, tmp_path / "figure.png", "Which runs these are, and how they were made. " * 8)
    for axis in figure.axes:
        assert axis.get_xlabel() or name == "ablation"  # whose places are named by their ticks
        assert axis.get_ylabel()
        assert axis.has_data()
    with Image.open(tmp_path / "figure.png") as image:
        image.load()
        assert image.width > 600
    caption = figure.get_supxlabel()
    assert caption.count("\n") >= 1
    width = figure.get_window_extent().width
    assert figure._supxlabel.get_window_extent().x1 <= width


def measurement(name, **settings):
    return Measurement(
        name=name,
        title=f"Title of {name} <&>",
        caption="Seeds 1, 2.",
        command="groupdetr analyze something --groups 1 2",
        rows=[{"num_groups": 1, "seed": 1, "AP": 0.25}, {"num_groups": 1, "seed": 2, "AP": 0.35}],
        summary=[{"num_groups": 1, "runs": 2, "AP": 0.3, "AP_std": 0.0707}, {"num_groups": 2, "runs": 1, "AP": None}],
        **settings,
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_measurement_leaves_its_files_and_a_page(tmp_path, capsys):
    for name in ("cost", "assignment"):
        write_measurement(measurement(name, settings={"epochs": 3}), FIGURES[name](), tmp_path)
    assert "| 1 | 2 | 0.300 ± 0.071 |\n| 2 | 1 | - |" in capsys.readouterr().out

    with (tmp_path / "cost.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"num_groups": "1", "seed": "1", "AP": "0.25"},
            {"num_groups": "1", "seed": "2", "AP": "0.35"},
        ]
    assert json.loads((tmp_path / "cost.json").read_text())["summary"][0]["AP_std"] == 0.0707

    page = Page((tmp_path / "index.html").read_text())
    assert not page.open
    assert [link for link in page.links if link.endswith(".png")] == ["assignment.png", "cost.png"]  # the paper's order
    assert all((tmp_path / link).is_file() for link in page.links)
    text = " ".join(page.text)
    for expected in ("Title of cost <&>", "groupdetr analyze something --groups 1 2", "0.300 ± 0.071", '"epochs": 3'):
        assert expected in text


def test_differences_are_printed_and_on_the_page(tmp_path, capsys):
    difference = {"num_groups": 2, "seeds": 2, "AP_difference": 0.05, "AP_from": -0.012, "AP_to": 0.112}
    write_measurement(measurement("cost", differences=[difference]), FIGURES["cost"](), tmp_path)
    assert "paired by seed" in (printed := capsys.readouterr().out)
    assert "| 2 | 2 | 0.050 | -0.012 | 0.112 |" in printed
    text = " ".join(Page((tmp_path / "index.html").read_text()).text)
    assert "paired by seed" in text
    assert "-0.012" in text


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no measurement in"):
        write_page(tmp_path)
