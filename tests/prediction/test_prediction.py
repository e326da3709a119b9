"""Predictions from images in memory and on disk, judged by the evaluation of the same images as a data set."""

import subprocess
import sys
import weakref
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from small_sizes import SIZES
from torch.utils.data import DataLoader

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.data import (
    AugmentationConfig,
    CocoDataset,
    DataError,
    DigitsConfig,
    collate,
    digits_dataset,
    eval_transforms,
)
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.prediction import InferenceSettings, Options, PredictOptions
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.config import OptimizationConfig

AUGMENTATION = AugmentationConfig(
    short_sides=(40,), crop=0, eval_short_side=40, eval_max_size=None, image_mean=(0.5,) * 3, image_std=(0.25,) * 3
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=4, val_images=5, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    config = CocoTrainingConfig(
        data=DataConfig(**digits._asdict(), workers=0),
        model=ModelConfig(num_groups=2, **SIZES),
        augmentation=AUGMENTATION,
        optimization=OptimizationConfig(epochs=1, lr=1e-3, backbone_lr=1e-3),
        output=output,
        pictures=0,
        report=False,
        track=(),
    )
    train(config)
    return output / "checkpoints" / "best"


@pytest.fixture
def model(checkpoint):
    return gd.load_model(checkpoint, device="cpu")


def small(name, **settings):
    torch.manual_seed(0)
    return gd.build_model(name, num_classes=3, num_groups=2, **{**SIZES, **settings})


def assert_same(first, second):
    assert first["class_names"] == second["class_names"]
    for name in ("scores", "labels", "boxes"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-4)


def test_predictions_are_those_of_the_evaluation(model, digits):
    dataset = CocoDataset(digits.val_images, digits.val_annotations, eval_transforms(AUGMENTATION))
    expected = []
    with torch.no_grad():
        for batch in DataLoader(dataset, 2, collate_fn=collate):
            batch = batch.to("cpu")
            expected += gd.postprocess(model(batch.images, batch.masks), batch.original_sizes, top_k=7)
    paths = sorted(digits.val_images.glob("*.png"))
    found = gd.predict(model, paths, score_threshold=0.0, top_k=7, batch_size=2)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert one["class_names"] == [str(label) for label in one["labels"].tolist()]  # the digits' names
        assert_same(one, {**other, "class_names": one["class_names"]})


def test_one_image_or_several_in_every_form(model, digits):
    paths = sorted(digits.val_images.glob("*.png"))[:3]
    arrays = [np.array(Image.open(path)) for path in paths]
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    expected = gd.predict(model, paths, score_threshold=0.0)
    one = gd.predict(model, paths[0], score_threshold=0.0)
    assert_same(one, expected[0])
    several = [[Image.open(path) for path in paths], arrays, np.stack(arrays), tensor, list(tensor), tensor / 255]
    for images in [*several, (str(path) for path in paths), [arrays[0], paths[1], tensor[2]]]:
        for found, other in zip(gd.predict(model, images, score_threshold=0.0), expected, strict=True):
            assert_same(found, other)
    blue_first = gd.predict(model, [array[..., ::-1] for array in arrays], score_threshold=0.0, channel_order="bgr")
    for found, other in zip(blue_first, expected, strict=True):
        assert_same(found, other)
    assert gd.predict(model, []) == []
    assert gd.predict(model, arrays[0], score_threshold=1.0)["class_names"] == []


@pytest.mark.parametrize("images", [None, b"bytes of a file"])
def test_what_is_neither_an_image_nor_several_is_refused(model, images):
    with pytest.raises(TypeError, match=f"expected a path, a PIL image, .* got {type(images).__name__}"):
        gd.predict(model, images)


def test_one_image_is_in_memory_at_a_time(model):
    given = []

    def images():
        for _ in range(5):
            assert all(image() is None for image in given)
            image = np.zeros((48, 48, 3), np.uint8)
            given.append(weakref.ref(image))
            yield image
            del image

    assert len(gd.predict(model, images(), batch_size=3)) == 5


def test_images_of_different_sizes_share_a_batch(model):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((30, 60), (64, 20), (48, 48))]
    together = gd.predict(model, images, score_threshold=0.0, batch_size=3)
    for image, found in zip(images, together, strict=True):
        alone = gd.predict(model, image, score_threshold=0.0)
        # Convolutions see the padding at an image's edge, and scores that lie close may then change places.
        for name, tolerance in (("scores", 1e-3), ("boxes", 0.2)):
            difference = found[name].sort(dim=0).values - alone[name].sort(dim=0).values
            assert difference.abs().max() < tolerance


def test_boxes_are_those_of_the_upright_image(model, tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored.save(tmp_path / "a.png", exif=exif)
    found = gd.predict(model, tmp_path / "a.png", score_threshold=0.0)
    assert_same(found, gd.predict(model, upright, score_threshold=0.0))


def test_the_model_is_afterwards_as_it_was(model):
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    found = gd.predict(model, np.zeros((48, 48, 3), np.uint8), score_threshold=0.0)
    assert not found["scores"].requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    with pytest.raises(DataError, match=r"image file nowhere.jpg does not exist"):
        gd.predict(model, ["nowhere.jpg"])
    assert [module.training for module in model.modules()] == modes


def test_masks_have_the_size_of_the_image():
    model = small("mask2former_r50", backbone="conv:8-16-16-16", encoder_dim_feedforward=32)
    settings = InferenceSettings(class_names=("a", "b"), augmentation=AUGMENTATION)
    found = gd.predict(model, np.zeros((30, 50), np.uint8), settings=settings, score_threshold=0.0, top_k=4)
    assert found["masks"].shape == (4, 30, 50)
    assert found["masks"].dtype == torch.bool
    assert set(found["class_names"]) <= {"a", "b", "2"}


def test_checkpoints_that_say_nothing_need_the_model_and_its_classes(tmp_path):
    torch.save({"model": gd.export_checkpoint(small("dab_detr_r50", backbone="resnet18"), None)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not say which detector it is of: pass --model"):
        gd.load_model(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"does not fit|has shape"):
        gd.load_model(tmp_path / "a.pth", model="dab_detr_r50")


def test_what_has_no_weights_is_not_asked_for_a_name(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"config.yaml cannot be read as a file of tensors: it is damaged"):
        gd.load_model(checkpoint.parents[1] / "config.yaml")
    with pytest.raises(ValueError, match=r"has neither \*.safetensors nor pytorch_model\*.bin"):
        gd.load_model(tmp_path)


def test_a_path_is_no_model(checkpoint):
    with pytest.raises(TypeError, match=r"model must be a detector, as gd.load_model\(path\) gives it, got a str"):
        gd.predict(str(checkpoint), np.zeros((8, 8, 3), np.uint8))


def test_a_checkpoint_builds_its_own_model(model, checkpoint):
    assert model.config.num_groups == 1
    assert (model.config.d_model, model.config.num_queries, model.config.num_classes) == (32, 5, 10)
    settings = model.inference_settings
    assert settings.class_names == tuple("0123456789")
    assert settings.category_ids == tuple(range(1, 11))
    for name in ("eval_short_side", "eval_max_size", "image_mean", "image_std"):
        assert getattr(settings.augmentation, name) == getattr(AUGMENTATION, name)
    assert not model.training
    assert gd.load_model(checkpoint, num_groups=2).config.num_groups == 2


def test_the_package_itself_does_not_need_the_extra():
    code = "import sys, groupdetr_fast as gd; assert 'pycocotools' not in sys.modules; assert callable(gd.predict)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'predictions'"):
        _ = gd.predictions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"score_threshold": float("nan")}, r"score_threshold must be in \[0, 1\], got nan"),
        ({"score_threshold": 2}, r"score_threshold must be in \[0, 1\], got 2"),
        ({"channel_order": "brg"}, "channel_order must be"),
    ],
)
def test_wrong_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        gd.predict(model, np.zeros((48, 48, 3), np.uint8), **settings)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:x", "meta"])
def test_devices_that_are_not_there_are_refused_in_one_sentence(checkpoint, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .*: give cpu") as error:
        gd.load_model(checkpoint, device=device)
    assert "\n" not in str(error.value)


def test_detectors_of_this_package_have_no_other_code_than_its_kernels(checkpoint, tmp_path):
    message = "accelerate_kernels is for models of transformers: leave it out for conditional_detr_r50"
    with pytest.raises(ValueError, match=message):
        gd.load_model(checkpoint, accelerate_kernels=False)
    with pytest.raises(ValueError, match=message):
        CocoTrainingConfig().with_settings(accelerate_kernels=False)
    image = tmp_path / "black.png"
    Image.new("RGB", (8, 8)).save(image)
    for command in (["predict", str(checkpoint), str(image)], ["eval", str(checkpoint), "--data-path", str(tmp_path)]):
        with pytest.raises(SystemExit, match=message):
            cli.main([*command, "--no-accelerate-kernels", "--output", str(tmp_path / "out")])


def test_the_arguments_by_name_are_those_that_are_checked():
    assert {each.name: each.type for each in fields(Options)} == PredictOptions.__annotations__
