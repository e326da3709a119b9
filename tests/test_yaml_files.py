import pytest

from groupdetr_fast.yaml_files import has_layout, read_yaml, yaml_text


def test_texts_stay_texts(tmp_path):
    table = {"no": 0.3, "on": 0.5, "1e5": 1.0, "yes ": 2.0, "käfer": 3.0, "true": 4.0, "7": 5.0}
    (tmp_path / "a.yaml").write_text(yaml_text(table))
    assert read_yaml(tmp_path / "a.yaml") == table


def test_booleans_and_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("[no, off, y, true, False, 1e-4, .5, 10]")
    assert read_yaml(tmp_path / "a.yaml") == ["no", "off", "y", True, False, 1e-4, 0.5, 10]


@pytest.mark.parametrize(("text", "laid_out"), [("a: 1\nb: two\n", True), ("a:   1\n", False), ("a: 1 # b\n", False)])
def test_layout(text, laid_out):
    assert has_layout(text) is laid_out


def test_what_is_no_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read as yaml: while parsing"):
        read_yaml(tmp_path / "a.yaml")
