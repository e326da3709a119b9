"""DINO: its layout, how it selects queries, looks forward twice and what a denoising query sees. Its groups without
denoising queries are tested in test_groups_of_detectors.py, denoising queries by themselves in
tests/layers/test_denoising.py."""

import pytest
import torch
from small_detectors import SMALL, outputs, padded_batch, random_targets, small_detector, train_on_digits
from torch import nn
from torch.nn import functional as F

import groupdetr_fast as gd
from groupdetr_fast.models.dino import GroupLayerNorm, GroupLinear, GroupMLP, token_anchors


def small_dino(num_groups=3, **overrides):
    return small_detector("dino_4scale_r50", num_groups, **{"denoising_queries": 7, "decoder_layers": 3, **overrides})


def denoising_outputs(out):
    return torch.cat((out.denoising.logits, out.denoising.boxes), dim=-1)


def test_tensors_are_those_of_the_original_repository():
    """Its files have 626: it saves the heads, which all six layers share, six times, and all that twice."""
    state = gd.build_model("dino_4scale_r50", num_classes=91, num_groups=1).state_dict()
    shared = [key for key in state if key.startswith(("class_embed.", "bbox_embed."))]
    assert len(state) + 11 * len(shared) == 626
    assert state["tgt_embed.weight"].shape == (900, 256)
    assert state["label_enc.weight"].shape == (92, 256)
    assert state["enc_output.weight"].shape == (256, 256)
    assert state["enc_out_class_embed.weight"].shape == (91, 256)


def test_defaults_are_the_published_ones():
    config = gd.build_model("dino_4scale_r50", num_classes=91, num_groups=3, backbone="conv:8-16-24").config
    assert (config.num_queries, config.denoising_queries, config.denoising_scope) == (900, 100, "first")
    assert (config.box_noise, config.position_temperature) == (0.4, 20)
    # The repository's dn_label_noise_ratio of 0.5 replaces a quarter of the labels.
    assert config.label_noise == 0.25
    assert type(config)().num_groups == 3


def test_starts_as_the_original_repository_does():
    model = gd.build_model("dino_4scale_r50", num_classes=7, num_groups=3, backbone="conv:8-16-24")
    for head in (model.bbox_embed, model.enc_out_bbox_embed):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
    for head in (model.class_embed, model.enc_out_class_embed):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full_like(head.bias, 0.01))
    # Xavier's bound for one group, whatever the number of groups
    assert model.tgt_embed.weight.abs().max().item() == pytest.approx((6 / (900 + 256)) ** 0.5, rel=1e-3)
    assert model.enc_output.weight.abs().max().item() == pytest.approx((6 / (256 + 256)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("groups", [slice(0, 3), slice(1, 3), slice(2, 3)], ids=["all", "two", "one"])
@pytest.mark.parametrize("shared", [False, True], ids=["own input", "shared input"])
def test_group_heads_equal_a_loop_over_plain_layers(groups, shared):
    linear, norm, mlp = GroupLinear(3, 8, 5), GroupLayerNorm(3, 8), GroupMLP(3, 8, 16, 4, 3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    count = groups.stop - groups.start
    x = torch.randn(2, 1 if shared else count, 7, 8)
    for index in range(count):
        own = x[:, 0 if shared else index]
        group = groups.start + index

        def of_group(layer, group=group):
            return (parameter.chunk(3)[group] for parameter in (layer.weight, layer.bias))

        torch.testing.assert_close(linear(x, groups)[:, index], F.linear(own, *of_group(linear)))
        torch.testing.assert_close(norm(x, groups)[:, index], F.layer_norm(own, (8,), *of_group(norm)))
        expected = own
        for number, layer in enumerate(mlp.layers):
            expected = F.linear(expected.relu() if number else expected, *of_group(layer))
        torch.testing.assert_close(mlp(x, groups)[:, index], expected)


def select_by_loops(model, memory, levels):
    """What every group selects, by plain layers on all tokens of one image after another."""
    config = model.config
    anchors, valid = token_anchors(levels)
    logits, boxes = [], []
    for image in range(len(memory)):
        for group in range(config.num_groups):
            rows = {key: model.get_parameter(key).chunk(config.num_groups)[group] for key in model.group_parameters}

            def parameters(name, rows=rows):
                return rows[f"{name}.weight"], rows[f"{name}.bias"]

            tokens = memory[image].where(valid[image, :, None], 0)
            tokens = F.linear(tokens, *parameters("enc_output"))
            tokens = F.layer_norm(tokens, (config.d_model,), *parameters("enc_output_norm"))
            scores = F.linear(tokens, *parameters("enc_out_class_embed"))
            moves = F.linear(tokens, *parameters("enc_out_bbox_embed.layers.0"))
            moves = F.linear(moves.relu(), *parameters("enc_out_bbox_embed.layers.1"))
            moves = F.linear(moves.relu(), *parameters("enc_out_bbox_embed.layers.2"))
            best = scores.max(dim=-1).values.argsort(descending=True, stable=True)[: config.num_queries]
            logits.append(scores[best])
            boxes.append((moves + anchors[image])[best].sigmoid())
    shape = (len(memory), config.num_groups * config.num_queries, -1)
    return torch.stack(logits).reshape(shape), torch.stack(boxes).reshape(shape)


def test_query_selection_equals_loops_over_all_tokens():
    """Values, and every gradient, though only the chosen tokens are computed with one."""
    model = small_dino()
    heads = [parameter for key, parameter in model.named_parameters() if key.startswith("enc_out")]
    images, masks = padded_batch()
    out = model(images, masks)
    memory, levels = model.encode(images, masks)
    memory = memory.detach().requires_grad_()
    ours = model._select_queries(memory, levels, out.groups, 0)
    torch.testing.assert_close(out.encoder.boxes, ours.boxes, rtol=1e-4, atol=1e-5)
    expected = select_by_loops(model, memory, levels)
    weights = [torch.randn_like(part) for part in expected]
    grads = []
    for logits, boxes in ((ours.logits, ours.boxes), expected):
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes, expected[1], rtol=1e-4, atol=1e-5)
        loss = (logits * weights[0]).sum() + (boxes * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, (memory, *heads)))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_too_few_tokens_are_refused():
    model = small_dino(num_queries=100).eval()
    with pytest.raises(ValueError, match="images must have at least num_queries=100 tokens, these have 85"):
        model(torch.randn(1, 3, 16, 16))


def test_looks_forward_twice():
    """A layer's boxes teach the moves of that layer and of the one before, and no others."""
    model = small_dino(num_groups=2)
    moves = []
    model.bbox_embed.register_forward_hook(lambda _module, _inputs, output: moves.append(output))
    images, masks = padded_batch()
    out = model(images, masks, random_targets(3, 1))
    assert len(moves) == 3  # after the first and the second layer, and then those of all layers at once
    for layer in range(3):
        boxes = out.boxes[layer]
        loss = (boxes * torch.randn_like(boxes)).sum()
        grads = torch.autograd.grad(loss, moves, retain_graph=True, allow_unused=True)
        assert [grad is not None and grad.any().item() for grad in grads[:2]] == [layer == 1, layer == 2]
        assert [grad.any().item() for grad in grads[2]] == [index == layer for index in range(3)]
    first_stage = model.enc_out_bbox_embed.layers[-1].weight
    assert torch.autograd.grad(out.boxes.sum(), first_stage, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(out.encoder.boxes.sum(), first_stage)[0].any()


def who_sees_whom(groups):
    """DINO's rule, for each set of denoising queries and the query group it belongs to: ``[L, L]`` bool."""
    owner = []  # of every query: its query group, and its denoising group or None
    for query_group in range(groups.denoising_sets):
        for denoising_group in range(groups.denoising_groups):
            owner += [(query_group, denoising_group)] * groups.queries_per_denoising_group
    for query_group in range(groups.num_groups):
        owner += [(query_group, None)] * groups.queries_per_group
    return torch.tensor([[a[0] == b[0] and b[1] in (None, a[1]) for b in owner] for a in owner])


@pytest.mark.parametrize("scope", ["first", "every"])
def test_a_query_sees_what_the_base_model_lets_it_see(scope):
    """Read from gradients through the whole decoder in training, exactly zero where the rule forbids sight."""
    model = small_dino(denoising_scope=scope, dropout=0.1)
    contents = []

    def keep(_module, arguments):
        contents.append(arguments[0].detach().requires_grad_())
        return contents[0], *arguments[1:]

    model.decoder.register_forward_pre_hook(keep)
    images, masks = padded_batch()
    images.requires_grad_()
    out = model(images, masks, random_targets(3, 1))
    groups = out.denoising.queries.groups
    # 7 // 3 denoising groups of 3 positives and as many negatives, also in the image with one object
    assert (groups.denoising_groups, groups.queries_per_denoising_group) == (2, 6)
    assert groups.denoising_sets == (1 if scope == "first" else 3)
    logits = torch.cat((out.denoising.logits, out.logits), dim=2)
    sees = who_sees_whom(groups)
    for image in range(2):
        for query in range(groups.length):
            loss = (logits[:, image, query] * torch.randn(logits.shape[0], logits.shape[-1])).sum()
            image_grad, content_grad = torch.autograd.grad(loss, (images, contents[0]), retain_graph=True)
            assert torch.equal(content_grad[image].any(-1), sees[query]), f"query {query}"
            assert not content_grad[1 - image].any()
            assert image_grad[image].any()
            assert not image_grad[1 - image].any()


def test_denoising_is_that_of_the_base_model():
    """With the same noise, the denoising queries of a model with groups predict what those of the base model do."""
    grouped, base = small_dino(num_groups=3), small_dino(num_groups=1)
    state = grouped.state_dict()
    base.load_state_dict({**state, **{key: state[key].chunk(3)[0] for key in grouped.group_parameters}})
    images, masks = padded_batch()
    targets = random_targets(3, 1)
    outs = []
    for model in (grouped, base):
        torch.manual_seed(5)
        outs.append(model(images, masks, targets))
    torch.testing.assert_close(*(denoising_outputs(out) for out in outs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(outs[0]).chunk(3, dim=2)[0], outputs(outs[1]), rtol=1e-4, atol=1e-5)


def test_denoising_needs_training_and_objects():
    images, masks = padded_batch()
    model, targets = small_dino(), random_targets(3, 1)
    assert model(images, masks, targets).denoising is not None
    assert small_dino(denoising_queries=0)(images, masks, targets).denoising is None
    empty = model(images, masks, random_targets(0, 0))
    assert empty.denoising is None
    gd.build_criterion(model)(empty, random_targets(0, 0))["loss"].backward()
    assert model.label_enc.weight.grad is not None  # DistributedDataParallel waits for it
    model.eval()
    assert model(images, masks, targets).denoising is None
    assert model(images, masks, targets, num_groups=3).denoising is not None


def test_a_few_steps_lower_the_losses_that_other_detectors_lack(tmp_path):
    torch.manual_seed(0)
    settings = {**SMALL, "d_model": 64, "denoising_queries": 10}
    model = gd.build_model("dino_4scale_r50", num_classes=10, num_groups=2, **settings)
    history = train_on_digits(model, tmp_path, steps=25)
    for key in (f"loss_{kind}{suffix}" for suffix in ("_enc", "_dn") for kind in ("ce", "bbox", "giou")):
        first, last = (sum(step[key] for step in part) / 5 for part in (history[:5], history[-5:]))
        assert last < first, key
