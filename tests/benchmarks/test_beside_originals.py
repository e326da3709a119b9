"""``python benchmarks beside_originals``. The comparison itself needs checkouts of the originals."""

from dataclasses import replace

import pytest
import torch

import groupdetr_fast as gd
from cpu import beside_originals
from cpu.beside_originals import ORIGINALS, Difference, build_both, compare, parameter_pairs
from cpu.originals.conditions import Noise, in_doubles
from groupdetr_fast.layers import denoising

# name: folder of its checkout, predictions, and kinds of losses beside those of every layer
CHECKOUTS = {
    "group_detr": ("GroupDETR", {"logits", "boxes"}, ()),
    "conditional_detr": ("ConditionalDETR", {"logits", "boxes"}, ()),
    "dab_detr": ("DAB-DETR", {"logits", "boxes"}, ()),
    "dn_detr": ("DN-DETR", {"logits", "boxes", "denoising logits", "denoising boxes"}, ("_dn",)),
    "dab_deformable_detr": ("DAB-DETR", {"logits", "boxes"}, ()),
    "dino": (
        "DINO",
        {"logits", "boxes", "denoising logits", "denoising boxes", "encoder logits", "encoder boxes"},
        ("_dn", "_enc"),
    ),
}
LAYERS = ("_0", "_1", "")
# Contents are 0 before the first layer, and so all values are the same, whatever is attended to.
UNTESTED = {
    f"decoder.layers.0.sa_{part}"
    for part in (
        *(f"{name}_proj.{of}" for name in ("qcontent", "qpos", "kcontent", "kpos") for of in ("weight", "bias")),
        "v_proj.weight",
    )
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_folder_without_the_original_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks beside_originals", name, "--original", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* is no checkout of https://github.com/"):
        beside_originals.main()


def test_originals_without_a_guard_have_no_option_for_it(tmp_path, monkeypatch):
    arguments = ["group_detr", "--original", str(tmp_path), "--published-giou"]
    monkeypatch.setattr("sys.argv", ["benchmarks beside_originals", *arguments])
    with pytest.raises(SystemExit, match="group_detr adds nothing in its generalised IoU: leave out --published-giou"):
        beside_originals.main()


@pytest.mark.parametrize("name", ORIGINALS)
def test_ours_is_the_original(name, checkout):
    folder, predictions, kinds = CHECKOUTS[name]
    differences = compare(name, checkout(folder))
    assert all(each.relative < 1e-9 for each in differences)
    found = {kind: {each.what for each in differences if each.kind == kind} for kind in beside_originals.KINDS}
    assert {what.partition(", layer")[0] for what in found["prediction"]} == predictions
    suffixes = {kind + layer for kind in ("", *kinds) for layer in (LAYERS if kind != "_enc" else ("",))}
    assert found["loss"] == {"loss"} | {f"loss_{part}{end}" for part in ("ce", "bbox", "giou") for end in suffixes}
    pair = ORIGINALS[name]
    settings = {"num_groups": 1, **pair.settings, **beside_originals.SIZES, **beside_originals.BACKBONES["small"]}
    model = gd.build_model(pair.model, num_classes=beside_originals.CLASSES, **settings)
    assert found["gradient"] | found["zero"] == {name for name, _ in model.named_parameters()}
    assert {what for what in found["zero"] if not what.endswith(("_kcontent_proj.bias", "_kpos_proj.bias"))} <= UNTESTED
    assert [each.what for each in differences if each.kind == "evaluation"][-3:] == [
        f"{part} of detections" for part in ("scores", "labels", "boxes")
    ]


@pytest.mark.parametrize(
    ("name", "objects"),
    [
        *((name, (1, 1, 1)) for name in ORIGINALS),
        *((name, (0, 0, 0)) for name in ORIGINALS if name != "group_detr"),
    ],
)
def test_it_is_with_one_object_an_image_and_without_objects(name, objects, checkout):
    differences = compare(name, checkout(CHECKOUTS[name][0]), objects=objects)
    assert all(each.relative < 1e-9 for each in differences)
    denoised = any("denoising" in each.what for each in differences)
    assert denoised == ("_dn" in CHECKOUTS[name][2] and any(objects))


def test_without_objects_groups_count_as_often_as_there_are_in_group_detr(checkout):
    """Ours are a third of theirs, so that three groups weigh no more than one."""
    for each in compare("group_detr", checkout(CHECKOUTS["group_detr"][0]), objects=(0, 0, 0)):
        if each.kind == "loss" and (each.what == "loss" or "_ce" in each.what):
            assert each.relative == pytest.approx(2 / 3)
        elif each.kind in ("loss", "prediction", "evaluation"):
            assert each.relative < 1e-9


@pytest.mark.parametrize("name", ORIGINALS)
def test_weights_are_drawn_as_in_the_original(name, checkout):
    with in_doubles():
        ours, theirs = build_both(name, checkout(CHECKOUTS[name][0]), num_queries=300, dim_feedforward=512)
    for key, pair in parameter_pairs(ours, theirs.net).items():
        (own_mean, own), (mean, deviation) = ((each.mean().item(), each.std(correction=0).item()) for each in pair)
        larger, number = max(own, deviation), pair[0].numel()
        assert abs(own_mean - mean) <= 8 * larger / number**0.5 + 1e-9, key
        assert abs(own - deviation) <= max(2 / number**0.5, 0.02) * larger + 1e-9, key
        assert pair[0].requires_grad == pair[1].requires_grad, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_dc5"])
def test_so_is_its_resnet(name, backbone, checkout):
    differences = compare(name, checkout(CHECKOUTS[name][0]), backbone=backbone)
    assert all(each.relative < 1e-9 for each in differences)
    trained = {each.what.split(".")[2] for each in differences if each.what.startswith("backbone.") and each.largest}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", [name for name, pair in ORIGINALS.items() if pair.guarded_giou])
def test_what_an_original_adds_in_its_giou_changes_that_loss_alone(name, checkout):
    differences = compare(name, checkout(CHECKOUTS[name][0]), published_giou=True)
    for each in differences:
        if each.kind == "loss" and (each.what == "loss" or "giou" in each.what):
            assert 1e-9 < each.relative < 1e-4
        elif each.kind in ("loss", "prediction"):
            assert each.relative < 1e-12
    assert 1e-9 < max(each.relative for each in differences if each.kind == "gradient") < 1e-3


def test_a_fault_in_groups_is_found(checkout, monkeypatch):
    folder, build = checkout("GroupDETR"), gd.build_criterion
    monkeypatch.setattr(gd, "build_criterion", lambda model: build(model, assignment="one_to_many"))
    monkeypatch.setattr("sys.argv", ["benchmarks beside_originals", "group_detr", "--original", str(folder)])
    with pytest.raises(SystemExit, match="error: they differ, most in the "):
        beside_originals.main()


def test_other_noise_is_found(checkout, monkeypatch):
    monkeypatch.setitem(ORIGINALS, "dino", replace(ORIGINALS["dino"], settings={"label_noise": 0.5}))
    differences = compare("dino", checkout("DINO"))
    assert max(each.relative for each in differences if each.what == "denoising logits, layer 0") > 1e-2


@pytest.mark.parametrize(
    ("name", "high", "other", "message"),
    [
        ("dn_detr", 91, 1, "labels are drawn from 0 to below 1, not from 0 to below 91"),
        ("dino", 91, 1, "labels are drawn from 0 to below 1, not from 0 to below 91"),
        ("dino", 2, 1, "signs of boxes are drawn from 0 to below 1, not from 0 to below 2"),
    ],
)
def test_noise_from_another_range_is_found(name, high, other, message, checkout, monkeypatch):
    class Faulty:
        """torch, but for a range."""

        def __getattr__(self, function):
            return getattr(torch, function)

        def randint_like(self, like, beyond):
            return torch.randint_like(like, other if beyond == high else beyond)

    folder = checkout(CHECKOUTS[name][0])
    monkeypatch.setattr(denoising, "torch", Faulty())
    with pytest.raises(ValueError, match=message):
        compare(name, folder)


@pytest.mark.parametrize("bounds", [(3,), (1, 2), (0, 3)])
def test_draws_know_every_way_to_ask_for_a_range(bounds):
    noise = Noise((2,), copies=2, num_classes=5, generator=torch.Generator().manual_seed(0))
    boxes = torch.zeros(4, 4)
    named = dict(zip(("low", "high")[-len(bounds) :], bounds, strict=True))
    with noise.concatenated():
        for args, kwargs in ((bounds, {}), ((), named), (bounds[:-1], {"high": bounds[-1]})):
            with pytest.raises(ValueError, match=f"signs of boxes are drawn from .* to below {bounds[-1]}, not"):
                torch.randint_like(boxes, *args, **kwargs)


def test_both_get_the_same_draws():
    sizes = (2, 0, 3)
    noise = Noise(sizes, copies=4, num_classes=5, generator=torch.Generator().manual_seed(0))
    boxes, labels = torch.zeros(3, 6, 4), torch.zeros(3, 6, dtype=torch.int64)  # two copies
    with noise.packed():
        ours = [
            torch.rand_like(boxes),
            torch.randint_like(boxes, 2),
            torch.rand(labels.shape),
            torch.randint_like(labels, 5),
        ]
    boxes, labels = torch.zeros(10, 4), torch.zeros(10, dtype=torch.int64)
    with noise.concatenated():
        theirs = [
            torch.rand_like(boxes),
            torch.randint_like(boxes, low=0, high=2),
            torch.rand_like(labels.float()),
            torch.randint_like(torch.arange(10), 0, high=5),
        ]
    for packed, concatenated in zip(ours, theirs, strict=True):
        copies = packed.unflatten(1, (2, 3)).transpose(0, 1)
        expected = [copies[copy, image, :size] for copy in range(2) for image, size in enumerate(sizes)]
        assert torch.equal(concatenated.to(packed.dtype), torch.cat(expected))
    assert set(ours[1].unique().tolist()) == {0, 1}


def test_in_doubles_nothing_is_single_and_nothing_on_a_gpu():
    with in_doubles():
        made = [torch.ones(2), torch.ones(2, dtype=torch.float32), torch.arange(2).float(), torch.ones(2).cuda()]
        assert {(each.dtype, each.device.type) for each in made} == {(torch.float64, "cpu")}
        assert torch.ones(2).to("cuda").device.type == "cpu"
    assert torch.ones(2).dtype == torch.float32


def test_differences_from_zeros_are_no_agreement():
    zero, one = torch.zeros(2), torch.ones(2)
    assert Difference.of("loss", "loss_ce", zero, zero).relative == 0
    assert Difference.of("loss", "loss_ce", one, zero).relative == torch.inf
    assert Difference.of("zero", "bias", one, zero, smallest=2.0).relative == 0.5


def test_what_is_not_finite_is_no_agreement():
    with pytest.raises(ValueError, match="loss_ce: not all values are finite"):
        Difference.of("loss", "loss_ce", torch.tensor(torch.nan), torch.tensor(1.0))


def test_a_gradient_is_zero_only_where_it_is_in_both(monkeypatch):
    ours, theirs = torch.nn.ParameterDict(), torch.nn.ParameterDict()
    for name, own, other in (("a", 1.0, 1.0), ("b", 1e-17, 3e-17), ("c", 1e-17, 1e-5)):
        for model, gradient in ((ours, own), (theirs, other)):
            model[name] = torch.nn.Parameter(torch.zeros(1))
            model[name].grad = torch.tensor([gradient])
    pairs = {name: (ours[name], theirs[name]) for name in ours}
    monkeypatch.setattr(beside_originals, "parameter_pairs", lambda *models: pairs)
    found = {each.what: each for each in beside_originals._gradients(ours, theirs)}
    assert {name: each.kind for name, each in found.items()} == {"a": "gradient", "b": "zero", "c": "gradient"}
    assert found["b"].relative < 1e-16
    assert found["c"].relative == pytest.approx(1)
