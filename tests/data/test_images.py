import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from groupdetr_fast.data import DataError
from groupdetr_fast.data.images import IMAGE_SUFFIXES, as_rgb, decode_rgb, is_turned, upright_size

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(PIXELS), PIXELS, EXPECTED, EXPECTED / 255]
    forms.append(np.dstack((PIXELS, np.full((5, 7), 9, dtype=np.uint8))))  # RGBA
    forms.append(PIXELS[::-1, ::-1][::-1, ::-1])  # negative strides
    for form in forms:
        assert torch.equal(as_rgb(form), EXPECTED)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_raster_formats_are_read_whatever_the_file_is_called(tmp_path, kind):
    Image.new("RGB", (7, 5), "white").save(tmp_path / "a.jpg", kind)
    assert torch.equal(as_rgb(tmp_path / "a.jpg"), torch.full((3, 5, 7), 255, dtype=torch.uint8))


def test_grey_images_and_palettes_become_rgb():
    grey = PIXELS[..., 0]
    expected = torch.from_numpy(grey).expand(3, -1, -1)
    for form in (
        Image.fromarray(grey),
        grey,
        grey[..., None],
        torch.from_numpy(grey),
        Image.fromarray(grey).convert("P"),
    ):
        assert torch.equal(as_rgb(form), expected)
    assert as_rgb(Image.fromarray(PIXELS).convert("RGBA")).shape == (3, 5, 7)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert decode_rgb(image)[0].tolist() == [[0, 0, 1, 255]]


@pytest.mark.parametrize(("values", "expected"), [([0, 0.5, 1], [0, 128, 255]), ([0, 99.6, 255], [0, 100, 255])])
def test_floats_are_not_black(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    assert as_rgb(tmp_path / "a.tif")[0].tolist() == [expected]


@pytest.mark.parametrize("value", [-1, 256, float("nan")])
def test_floats_of_other_ranges_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif cannot be read \(its pixels are floats beyond \[0, 255\]; store"):
        as_rgb(tmp_path / "a.tif")


def test_arrays_of_opencv_are_read_by_their_order(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    reversed_rgba = np.dstack((PIXELS[..., ::-1], np.full((5, 7), 9, dtype=np.uint8)))
    for form in (PIXELS[..., ::-1], reversed_rgba, EXPECTED.flip(0), tmp_path / "a.png", Image.fromarray(PIXELS)):
        assert torch.equal(as_rgb(form, channel_order="bgr"), EXPECTED)
    with pytest.raises(ValueError, match='channel_order must be "rgb" or "bgr", got \'brg\''):
        as_rgb(PIXELS, channel_order="brg")


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation, kind):
    # The upright image has one bright quarter, in its upper left corner.
    stored = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    size = (8, 16) if orientation < 5 else (16, 8)  # height, width of the stored image
    pixels = np.zeros(size, dtype=np.uint8)
    rows, columns = (slice(half * side // 2, (half + 1) * side // 2) for half, side in zip(stored, size, strict=True))
    pixels[rows, columns] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    # Pillow 13 misreads grey TIFFs that are turned and not compressed.
    settings = {"webp": {"lossless": True}, "tiff": {"compression": "tiff_lzw"}}.get(kind, {})
    image.save(tmp_path / f"a.{kind}", exif=exif, **settings)
    with Image.open(tmp_path / f"a.{kind}") as file:
        assert is_turned(file) == (orientation > 1)
        assert upright_size(file) == (16, 8)
    upright = as_rgb(tmp_path / f"a.{kind}")
    assert upright.shape == (3, 8, 16)
    assert (upright[:, :4, :8] == 255).all()
    assert upright.sum() == 3 * 255 * 4 * 8


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param(b"MM\0*\xff\xff", id="no offset"),
        pytest.param(b"MMMM\0\0\0\x08", id="no TIFF"),
        pytest.param(b"MM\0*\0\0\0\x08\0", id="half a number of entries"),
        pytest.param(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", id="half an entry"),
    ],
)
def test_a_damaged_orientation_is_none(tmp_path, tags):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0" + tags)
    assert torch.equal(as_rgb(tmp_path / "a.png"), EXPECTED)


def test_tags_as_a_text_that_is_not_hexadecimal_are_none(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nnone\n")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=text)
    assert torch.equal(as_rgb(tmp_path / "a.png"), EXPECTED)


def test_a_fault_of_this_package_is_no_damaged_orientation(tmp_path, monkeypatch):
    image = Image.fromarray(PIXELS)
    monkeypatch.setattr(Image.Exif, "get", lambda *_: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        is_turned(image)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), ValueError, "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "channels"),
        (
            np.zeros((3, 40, 60), np.uint8),
            ValueError,
            r"the array \[3, 40, 60\] has its channels first: give array.trans",
        ),
        (torch.zeros(40, 60, 3), ValueError, r"the tensor \[40, 60, 3\] has its channels last: give tensor.permute"),
        (np.zeros((3, 40, 5), np.uint8), ValueError, r"the array \[3, 40, 5\] has its channels first"),
        (np.zeros((4, 4), np.int64), ValueError, "must be uint8 or floats"),
        (torch.full((3, 4, 4), 2.0), ValueError, r"must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), float("nan")), ValueError, r"must lie in \[0, 1\]"),
        (7, TypeError, "expected a path, a PIL image"),
        (b"a", TypeError, r"got bytes: open them by PIL.Image.open\(io.BytesIO"),
        (".", DataError, "^. is a folder, not an image: give the files in it$"),
        ("http://host/a.jpg", DataError, "download http://host/a.jpg, and give its file"),
        ("missing.png", DataError, r"image file missing.png does not exist"),
    ],
)
def test_what_is_no_image_is_refused(image, kind, message):
    with pytest.raises(kind, match=message):
        as_rgb(image)


def test_read_only_arrays_are_read_without_a_warning():
    pixels = PIXELS.copy()
    pixels.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_rgb(pixels), EXPECTED)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_an_image(tmp_path):
    assert ".avif" in IMAGE_SUFFIXES
    Image.new("RGB", (16, 8), "white").save(tmp_path / "a.avif")
    assert as_rgb(tmp_path / "a.avif").shape == (3, 8, 16)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image file .*a.jpg cannot be read"):
        as_rgb(tmp_path / "a.jpg")
