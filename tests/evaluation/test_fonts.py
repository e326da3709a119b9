"""Names of classes in pictures: formulas, a leading underscore, characters that matplotlib's font lacks."""

import logging
import warnings

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.text import Text

from groupdetr_fast.evaluation import diagnose, draw_image, fonts
from groupdetr_fast.evaluation.plots import draw_confusion, draw_precision_recall
from groupdetr_fast.evaluation.visualize import draw_frame


@pytest.fixture(autouse=True)
def anew():
    """Nothing of what other tests have found or said."""
    for cached in (fonts._font_of, fonts._say_that_characters_lack, fonts._characters):
        cached.cache_clear()
    yield
    fonts._font_of.cache_clear()


@pytest.fixture
def blood(tmp_path, monkeypatch):
    """A font that has a square as 血, and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "blood"])
    builder.setupCharacterMap({ord("血"): "blood"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "blood": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "blood": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Blood", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    file = tmp_path / "blood.ttf"
    builder.save(file)
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist, FontEntry(fname=str(file), name="Blood")])
    return file


def without_fonts(monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [each for each in fontManager.ttflist if "DejaVu" in each.name])


def test_names_are_no_formulas():
    assert fonts.written("$x_1^{$ a") == {"text": "$x_1^{$ a", "fontfamily": ["DejaVu Sans"], "parse_math": False}
    assert fonts.written("two\nlines\t")["text"] == "two lines "


def test_another_font_writes_what_the_default_one_lacks(blood):
    assert fonts.written("血 cell")["fontfamily"] == ["DejaVu Sans", "Blood"]
    assert fonts.in_one_font(["血"]) == (["血"], str(blood))
    names, file = fonts.in_one_font(["血 cell"])  # more of it is in the default font
    assert (names, file) == (["□ cell"], fonts.DEFAULT)


def test_a_character_of_no_font_is_a_square_and_said_once(monkeypatch, caplog, tmp_path):
    without_fonts(monkeypatch)
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    found = {"labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8])}
    found["boxes"] = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40]])
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_image(image, found, ["血小板", "白"], tmp_path / "a.png")
        draw_frame(image, found, ["血小板", "白"])
    assert [record.getMessage() for record in caplog.records if record.name == fonts.__name__] == [
        "names of classes have characters that no font of this machine has: pictures have □ in their place until such "
        "a font is installed (for Chinese, Japanese and Korean, Noto Sans CJK)"
    ]


def test_pictures_of_a_diagnosis_have_the_names_as_they_are(tmp_path, monkeypatch):
    names = ["$x_1^{$ a", "_hidden", "$100 bill$"]
    box = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "image_id": 1}
    truth = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        "annotations": [{"id": number, "category_id": number, **box} for number in range(3)],
    }
    diagnosis = diagnose(truth, [{"image_id": 1, "category_id": 1, "bbox": box["bbox"], "score": 0.9}])
    written = []
    save = Figure.savefig

    def note_texts(figure, path):
        save(figure, path)
        written.extend((text.get_text(), text.get_parse_math()) for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", note_texts)
    draw_precision_recall(diagnosis.classes, tmp_path / "a.png")
    assert {(f"{name} (1)", False) for name in names} <= set(written)
    written.clear()
    draw_confusion(diagnosis, tmp_path / "b.png")
    assert all(written.count((name, False)) == 2 for name in names)
