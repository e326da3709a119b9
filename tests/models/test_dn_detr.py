"""DN-DETR: published sizes, what a denoising query sees, and training. Its groups without denoising queries are tested
in test_groups_of_detectors.py, the denoising queries themselves in tests/layers/test_denoising.py."""

import pytest
import torch
from small_detectors import CLASSES, SMALL, outputs, padded_batch, random_targets, small_detector, train_on_digits

import groupdetr_fast as gd

SIZE = SMALL["num_queries"]


@pytest.mark.parametrize("name", ["dn_detr_r50", "dn_detr_r50_dc5"])
def test_parameter_count_is_that_of_the_original(name):
    model = gd.build_model(name, num_classes=91, num_groups=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_694_977
    # the original file has 591 tensors, because it repeats the box head under transformer.decoder
    assert len(model.state_dict()) + len(model.bbox_embed.state_dict()) == 591
    assert model.label_enc.weight.shape == (92, 255)


def test_defaults_are_the_published_ones():
    config = gd.build_model("dn_detr_r50", num_classes=91, num_groups=11, backbone="conv:8").config
    assert (config.denoising_queries, config.label_noise, config.box_noise) == (100, 0.2, 0.4)
    assert (config.denoising_scope, config.dropout, config.position_temperature) == ("first", 0, 20)
    assert (config.class_loss, config.l1_loss, config.giou_loss) == (1, 5, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_queries": -1}, "denoising_queries must not be negative, got -1"),
        ({"label_noise": 1.5}, r"label_noise must be in \[0, 1\], got 1.5"),
        ({"box_noise": -0.1}, "box_noise must not be negative and must be finite, got -0.1"),
        ({"denoising_scope": "all"}, 'denoising_scope must be "first" or "every", got \'all\''),
        ({"num_heads": 3}, "d_model must be a multiple"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        gd.build_model("dn_detr_r50", num_classes=2, num_groups=1, **settings)


def base_model_mask(denoising_groups, size, queries):
    """Who sees whom in DN-DETR (section 4.4) with one group of queries: True where row may see column."""
    length = denoising_groups * size + queries
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[denoising_groups * size :, : denoising_groups * size] = False  # queries do not see denoising queries
    for one in range(denoising_groups):
        for other in range(denoising_groups):
            if one != other:
                mask[one * size : (one + 1) * size, other * size : (other + 1) * size] = False
    return mask


def expected_mask(layout):
    """Several groups: each of them as in the base model, with the denoising queries that belong to it."""
    groups, queries = layout.num_groups, layout.queries_per_group
    size, per_set = layout.queries_per_denoising_group, layout.denoising_groups
    denoising = layout.denoising_length
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for group in range(groups):
        own = torch.arange(denoising + group * queries, denoising + (group + 1) * queries)
        if group < layout.denoising_sets:
            own = torch.cat((torch.arange(group * per_set * size, (group + 1) * per_set * size), own))
            mask[own[:, None], own] = base_model_mask(per_set, size, queries)
        else:
            mask[own[:, None], own] = True
    return mask


@pytest.mark.parametrize(("num_groups", "scope"), [(1, "first"), (3, "first"), (3, "every")])
def test_every_query_sees_what_the_layout_allows_and_nothing_else(num_groups, scope, monkeypatch):
    """Read from gradients, exactly 0 where the layout forbids sight, in training, for images with different counts."""
    model = small_detector("dn_detr_r50", num_groups, denoising_queries=6, denoising_scope=scope, dropout=0.1)
    images, masks = padded_batch()
    queries = {}

    def record(*arguments):
        content, anchors, denoising = type(model)._queries(model, *arguments)
        queries["content"] = content.detach().requires_grad_()
        queries["anchors"] = anchors.detach().requires_grad_()
        return queries["content"], queries["anchors"], denoising

    monkeypatch.setattr(model, "_queries", record)
    out = model(images, masks, random_targets(3, 1))
    layout = out.denoising.queries.groups
    assert layout == gd.QueryGroups(num_groups, SIZE, 2, 3, scope)
    sequence = torch.cat((outputs(out.denoising), outputs(out)), dim=2)  # [layers, B, L, C + 4]
    allowed = expected_mask(layout)
    assert torch.equal(allowed, layout.attention_mask())
    for image in range(2):
        for row in range(layout.length):
            output = sequence[:, image, row]
            loss = (output * torch.randn_like(output)).sum()
            for name, leaf in queries.items():
                (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                seen = grad.any(dim=-1)
                assert not seen[1 - image].any(), f"{name}: image {1 - image} leaks into image {image}"
                assert torch.equal(seen[image], allowed[row]), f"{name} of row {row} in image {image}"


@pytest.mark.parametrize("scope", ["first", "every"])
def test_denoising_queries_do_not_change_the_predictions(scope):
    model = small_detector("dn_detr_r50", denoising_scope=scope)
    images, masks = padded_batch()
    without, given = model(images, masks), model(images, masks, random_targets(3, 1))
    assert without.denoising is None
    assert given.groups == without.groups == gd.QueryGroups(3, SIZE)
    torch.testing.assert_close(outputs(given), outputs(without), rtol=1e-5, atol=1e-5)
    groups = (3 if scope == "every" else 1) * (100 // 3)
    assert given.denoising.logits.shape == (2, 2, groups * 3, CLASSES)
    assert given.denoising.boxes.shape == (2, 2, groups * 3, 4)


def test_base_model_and_grouped_model_denoise_alike():
    """Group 0 with its denoising queries computes what a model with one group does, from the same noise."""
    grouped, base = small_detector("dn_detr_r50", 3), small_detector("dn_detr_r50", 1)
    state = grouped.state_dict()
    state["refpoint_embed.weight"] = state["refpoint_embed.weight"][:SIZE]
    base.load_state_dict(state)
    images, masks = padded_batch()
    targets = random_targets(3, 1)
    found = []
    for model in (grouped, base):
        torch.manual_seed(3)
        found.append(model(images, masks, targets))
    torch.testing.assert_close(outputs(found[0].denoising), outputs(found[1].denoising), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(found[0])[:, :, :SIZE], outputs(found[1]), rtol=1e-5, atol=1e-5)


def test_denoising_follows_the_mode_or_the_explicit_number_of_groups():
    model = small_detector("dn_detr_r50")
    images, masks = padded_batch()
    targets = random_targets(3, 1)
    assert model(images, masks, targets).denoising is not None
    assert model(images, masks).denoising is None
    model.eval()
    assert model(images, masks, targets).denoising is None
    assert model(images, masks, targets, num_groups=3).denoising is not None


def test_without_label_content_it_is_dab_detr():
    """A matching query's content is the class "unknown" and an indicator of 0; DAB-DETR's is zero."""
    dn, dab = small_detector("dn_detr_r50").eval(), small_detector("dab_detr_r50").eval()
    dab.load_state_dict({key: value for key, value in dn.state_dict().items() if key != "label_enc.weight"})
    images, masks = padded_batch()
    assert (outputs(dn(images, masks)) - outputs(dab(images, masks))).abs().max() > 1e-3
    torch.nn.init.zeros_(dn.label_enc.weight[-1])
    assert torch.equal(outputs(dn(images, masks)), outputs(dab(images, masks)))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 2), (9, 1)])
def test_any_number_of_objects_trains_every_parameter(sizes):
    """No parameter lacks a gradient, which DistributedDataParallel would not forgive."""
    model = small_detector("dn_detr_r50", denoising_queries=4)
    images, masks = padded_batch()
    targets = random_targets(*sizes)
    out = model(images, masks, targets)
    assert (out.denoising is None) == (max(sizes) == 0)
    losses = gd.build_criterion(model)(out, targets)
    losses["loss"].backward()
    assert ("loss_ce_dn" in losses) == (max(sizes) > 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.slow
def test_training_learns_to_undo_the_noise(tmp_path):
    """The first predictions leave the noise on the boxes as it is; later ones take some of it away."""
    torch.manual_seed(0)
    model = gd.build_model("dn_detr_r50", num_classes=10, num_groups=2, **SMALL)
    history = train_on_digits(model, tmp_path, steps=160)
    for key in ("loss_ce_dn", "loss_bbox_dn"):
        first, last = (sum(step[key] for step in part) / 5 for part in (history[:5], history[-5:]))
        assert last < 0.8 * first, key
