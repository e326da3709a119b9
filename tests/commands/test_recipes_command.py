"""The command ``groupdetr recipes``."""

from groupdetr_fast import cli
from groupdetr_fast.runs.recipes import RECIPES


def test_recipes_are_listed_with_the_papers_numbers(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(RECIPES)
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["recipe"] == ["K", "N", "epochs", "drop", "batch", "precision", "AP", "baseline"]
    assert cells["group_conditional_detr_r50_12e"] == ["11", "300", "12", "11", "16", "tf32", "37.6", "32.6"]
    assert cells["dino_4scale_r50_36e"] == ["1", "900", "36", "30", "16", "tf32", "50.9", "-"]
    assert {line[5] for name, line in cells.items() if "mask2former" in name} == {"bf16"}
