from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.ops import FrozenBatchNorm2d

from groupdetr_fast.layers.backbone import Backbone


def test_resnet_equals_torchvision(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    ours = Backbone("resnet18", str(path), num_levels=2).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    theirs.double().eval()
    expected = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer3": "3", "layer4": "4"})(images)
    levels = ours(images)
    assert ours.num_channels == [256, 512]
    for level, value in zip(levels, expected.values(), strict=True):
        torch.testing.assert_close(level, value, rtol=1e-9, atol=1e-9)


def test_resnet_norms_are_frozen_and_stages_too():
    backbone = Backbone("resnet18")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    everything = Backbone("resnet18", frozen_stages=0)
    assert all(p.requires_grad for p in everything.parameters())


@pytest.mark.parametrize("name", ["resnet18", "timm:tf_efficientnet_lite0"])
@pytest.mark.parametrize(("frozen", "stages"), [(5, None), (7, None), (2, 1)])
def test_all_stages_can_be_frozen(name, frozen, stages):
    backbone = Backbone(name, stages=stages, frozen_stages=frozen)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_timm_network(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = Backbone("timm:tf_efficientnet_lite0", str(tmp_path / "weights.safetensors"), frozen_stages=2)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images)[0], theirs.eval()(images)[-1], rtol=1e-4, atol=1e-5)
    assert ours.num_channels == [320]
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert any(name.startswith("body.network.conv_stem") for name in frozen)
    assert any(name.startswith("body.network.blocks.1") for name in frozen)
    assert not any(name.startswith("body.network.blocks.5") for name in frozen)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.train()(images)
    assert all(torch.equal(before[name], buffer) for name, buffer in ours.named_buffers())


def test_conv_network():
    backbone = Backbone("conv:8-16-24", num_levels=2)
    shapes = [tuple(level.shape) for level in backbone(torch.randn(1, 3, 32, 48))]
    assert shapes == [(1, 16, 8, 12), (1, 24, 4, 6)]
    assert backbone.num_channels == [16, 24]


@pytest.mark.parametrize(
    ("name", "stages", "channels", "stride"),
    [("resnet18", 3, 256, 16), ("timm:tf_efficientnet_lite0", 4, 112, 16), ("conv:8-16-24", 2, 16, 4)],
)
def test_fewer_stages(name, stages, channels, stride):
    backbone = Backbone(name, stages=stages)
    assert backbone.num_channels == [channels]
    assert backbone(torch.randn(1, 3, 64, 96))[0].shape == (1, channels, 64 // stride, 96 // stride)
    whole = Backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "resnet17"}, ValueError, "torchvision has no ResNet of that name"),
        ({"name": "vgg16"}, ValueError, "unknown backbone 'vgg16'"),
        ({"name": "timm:none"}, ValueError, "timm has no network of that name"),
        ({"name": "mm:resnet50"}, ValueError, "unknown backbone 'mm:resnet50'"),
        ({"name": "conv:8-x"}, ValueError, "must list the width of each stage"),
        ({"name": "conv:8-16", "dilation": True}, ValueError, "has neither dilation nor pretrained weights"),
        ({"name": "resnet18", "num_levels": 5}, ValueError, "num_levels must be 1 to 4"),
        ({"name": "resnet18", "stages": 5}, ValueError, "stages must be 1 to 4 for a ResNet such as resnet18, got 5"),
        ({"name": "resnet18", "stages": 3, "dilation": True}, ValueError, "which stages leaves out"),
        (
            {"name": "resnet18", "dilation": True},
            ValueError,
            "backbone 'resnet18' has no dilation: .* from resnet50 on",
        ),
        ({"name": "resnet18", "frozen_stages": -1}, ValueError, "frozen_stages must be at least 0, got -1"),
        ({"name": "conv:8-8", "frozen_stages": -1}, ValueError, "frozen_stages must be at least 0, got -1"),
        ({"name": "resnet18", "weights": "none.pth"}, FileNotFoundError, "there is no file none.pth"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Backbone(**arguments)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="does not fit backbone 'resnet34': it lacks"):
        Backbone("resnet34", str(tmp_path / "resnet18.pth"))


def test_weights_that_cannot_be_downloaded_say_which_file_belongs_where(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = (
        r"ImageNet weights of resnet18 cannot be downloaded \(.*no route.*\): put https://.*/(resnet18-\w+\.pth) at "
        rf"{tmp_path}/checkpoints/\1, or give the file as backbone_weights"
    )
    with pytest.raises(OSError, match=message):
        Backbone("resnet18", "imagenet")
