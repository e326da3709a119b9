"""Weights of transformers' Mask2Former and of its original repository."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import build, randomize, same_weights

import groupdetr_fast as gd
from groupdetr_fast.models import CheckpointMismatch
from groupdetr_fast.models.checkpoints import CheckpointHeader, read_header

NAME = "mask2former_r50"
# 256 channels, as published: with fewer, the two code bases group channels differently in their norms.
SIZES = {"d_model": 256, "decoder_layers": 4, "encoder_dim_feedforward": 80}


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        encoder_feedforward_dim=80,
        encoder_layers=2,
        decoder_layers=5,  # one more than layers: it counts the predictions
        num_attention_heads=4,
        dim_feedforward=96,
        num_queries=10,
        num_labels=7,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    torch.manual_seed(0)  # only here: what initial weights draw depends on the version
    randomize(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and "backbone" in name:
            torch.nn.init.kaiming_normal_(parameter, mode="fan_out")
        if name.endswith("bias") and "normalization" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # of either sign, for masks that are not everywhere
        elif "mask_projection" in name or "mask_embedder" in name:
            parameter.data *= 0.3  # masks with logits of the size that trained models have
        elif "queries" in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def assert_equal_to(theirs, ours):
    images = torch.randn(2, 3, 96, 128)
    expected = theirs(pixel_values=images, output_auxiliary_logits=True)
    out = ours.eval()(images)
    masks = torch.einsum("lbqd,bdhw->lbqhw", out.mask_embeddings, out.mask_features)
    inside = (expected.masks_queries_logits > 0).float().mean()
    assert 0.05 < inside < 0.95  # the comparison would mean little if masks were empty or everywhere
    for layer, predicted in enumerate([*expected.auxiliary_logits, expected]):
        torch.testing.assert_close(out.logits[layer], predicted["class_queries_logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(masks[layer], predicted["masks_queries_logits"], rtol=0, atol=1e-4)


def test_transformers_state_dict_gives_the_same_outputs(theirs):
    ours = build(NAME, **SIZES)
    report = gd.load_checkpoint(ours, theirs.state_dict())
    assert (report.layout, report.missing, report.dropped) == ("transformers", [], [])
    assert_equal_to(theirs, ours)


def test_transformers_directory_fills_the_first_group(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = build(NAME, num_groups=3, **SIZES)
    fresh = ours.query_feat.weight[10:].clone()
    report = gd.load_checkpoint(ours, tmp_path)
    assert (report.missing, report.groups) == ([], (1, 3))
    assert torch.equal(ours.query_feat.weight[10:], fresh)
    assert_equal_to(theirs, ours)


def test_a_directory_of_transformers_says_how_large_the_model_is(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, other = (gd.load_model(path, device="cpu") for path in (tmp_path, tmp_path / "model.safetensors"))
    assert_equal_to(theirs, ours)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in ours.state_dict().items())
    header = read_header(tmp_path)
    assert (header.model, header.labels, len(header.categories)) == (NAME, "contiguous", 7)
    assert header.model_config["loss_points"] == theirs.config.train_num_points
    content = json.loads((tmp_path / "config.json").read_text())
    for change in ({"backbone_config": None}, {"pre_norm": True}, {"mask_feature_size": 128}):
        (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
        assert read_header(tmp_path) == CheckpointHeader()
    (tmp_path / "config.json").write_text(json.dumps({**content, "decoder_layers": "5"}))
    with pytest.raises(ValueError, match=r"config\.json: 'model_config.decoder_layers' in the header must be"):
        read_header(tmp_path)


def original_names(model):
    """Name here -> key in the original repository's files, listed from its code."""
    names = {"backbone.body.conv1.weight": "backbone.stem.conv1.weight"}

    def norm(ours, theirs):
        for part in ("weight", "bias", "running_mean", "running_var"):
            names[f"{ours}.{part}"] = f"{theirs}.norm.{part}"

    def both(ours, theirs):
        for part in ("weight", "bias"):
            names[f"{ours}.{part}"] = f"{theirs}.{part}"

    norm("backbone.body.bn1", "backbone.stem.conv1")
    for stage in range(1, 5):
        for block in range(2):
            here, there = f"backbone.body.layer{stage}.{block}", f"backbone.res{stage + 1}.{block}"
            for conv in (1, 2):
                names[f"{here}.conv{conv}.weight"] = f"{there}.conv{conv}.weight"
                norm(f"{here}.bn{conv}", f"{there}.conv{conv}")
            if stage > 1 and block == 0:
                names[f"{here}.downsample.0.weight"] = f"{there}.shortcut.weight"
                norm(f"{here}.downsample.1", f"{there}.shortcut")
    here, there = "pixel_decoder", "sem_seg_head.pixel_decoder"
    for level in range(3):
        for part in range(2):
            both(f"{here}.input_proj.{level}.{part}", f"{there}.input_proj.{level}.{part}")
    names[f"{here}.level_embed"] = f"{there}.transformer.level_embed"
    for layer in range(model.config.encoder_layers):
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            same = f"encoder.layers.{layer}.self_attn.{part}"
            both(f"{here}.{same}", f"{there}.transformer.{same}")
        for part in ("linear1", "linear2", "norm1", "norm2"):
            same = f"encoder.layers.{layer}.{part}"
            both(f"{here}.{same}", f"{there}.transformer.{same}")
    for ours, key in (("lateral", "adapter_1"), ("smooth", "layer_1")):
        names[f"{here}.{ours}.0.weight"] = f"{there}.{key}.weight"
        both(f"{here}.{ours}.1", f"{there}.{key}.norm")
    both(f"{here}.mask_features", f"{there}.mask_features")
    there = "sem_seg_head.predictor"
    for layer in range(model.config.decoder_layers):
        here = f"decoder.layers.{layer}"
        for ours, kind, attention in (("cross", "cross", "multihead_attn"), ("self", "self", "self_attn")):
            block = f"{there}.transformer_{kind}_attention_layers.{layer}"
            for part in ("in_proj_weight", "in_proj_bias"):
                names[f"{here}.{ours}_attn.{part}"] = f"{block}.{attention}.{part}"
            both(f"{here}.{ours}_attn.out_proj", f"{block}.{attention}.out_proj")
            both(f"{here}.norm{1 if ours == 'cross' else 2}", f"{block}.norm")
        block = f"{there}.transformer_ffn_layers.{layer}"
        for ours, key in (("linear1", "linear1"), ("linear2", "linear2"), ("norm3", "norm")):
            both(f"{here}.{ours}", f"{block}.{key}")
    both("decoder.norm", f"{there}.decoder_norm")
    names["decoder.level_embed.weight"] = f"{there}.level_embed.weight"
    for table in ("query_feat", "query_embed"):
        names[f"{table}.weight"] = f"{there}.{table}.weight"
    both("class_embed", f"{there}.class_embed")
    for layer in range(3):
        both(f"mask_embed.layers.{layer}", f"{there}.mask_embed.layers.{layer}")
    return names


def original_file(model, **renamed):
    """What the repository saves: numpy arrays, and the weights of the classes in the loss."""
    names = original_names(model)
    state = {names[name]: tensor.numpy() for name, tensor in model.state_dict().items()}
    state["criterion.empty_weight"] = np.ones(8, dtype=np.float32)
    for old, new in renamed.items():
        state = {key.replace(new, old): array for key, array in state.items()}
    return {"model": OrderedDict(state), "__author__": "third_party", "iteration": np.float64(3)}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_of_the_original_repository(protocol, tmp_path):
    source, target = randomize(build(NAME, **SIZES)), build(NAME, **SIZES)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(original_file(source), protocol=protocol))
    report = gd.load_checkpoint(target, path)
    assert (report.layout, report.missing, report.dropped) == ("the original repository", [], [])
    assert same_weights(source, target)


def test_older_files_name_the_queries_and_the_pixel_decoder_differently(tmp_path):
    source, target = randomize(build(NAME, **SIZES)), build(NAME, num_groups=2, **SIZES)
    content = original_file(source, static_query="query_feat", sem_seg_head="sem_seg_head.pixel_decoder")
    assert "sem_seg_head.predictor.static_query.weight" in content["model"]
    assert "sem_seg_head.mask_features.weight" in content["model"]
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content))
    report = gd.load_checkpoint(target, path)
    assert (report.missing, report.groups) == ([], (1, 2))
    assert torch.equal(target.query_feat.weight[:10], source.query_feat.weight)
    assert torch.equal(target.pixel_decoder.mask_features.weight, source.pixel_decoder.mask_features.weight)


class Intruder:
    """A pickle that would create a file when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    path, model = tmp_path / "model.pkl", build(NAME, **SIZES)
    for content in ({"model": {"a": Intruder(tmp_path / "ran")}}, {"model": np.array([Intruder(tmp_path / "ran")])}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"model.pkl cannot be read as a pickle of arrays: it holds objects"):
            gd.load_checkpoint(model, path)
    assert not (tmp_path / "ran").exists()
    for content in (b"damaged", pickle.dumps([1, 2]), pickle.dumps({"model": {"a": "text"}})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .*model.pkl"):
            gd.load_checkpoint(model, path)


def test_checkpoints_of_other_models_are_recognised():
    with pytest.raises(CheckpointMismatch, match=r"does not fit ConditionalDetr \(it looks like one of Mask2Former"):
        gd.load_checkpoint(build(), {key: torch.zeros(1) for key in original_names(build(NAME, **SIZES)).values()})
    with pytest.raises(CheckpointMismatch, match=r"does not fit Mask2Former \(it looks like one of Conditional DETR"):
        gd.load_checkpoint(build(NAME, **SIZES), build().state_dict())
