"""The deformable layers against transformers' Deformable DETR, torch's attention and plain loops."""

import re

import pytest
import torch
from torch import nn

import groupdetr_fast as gd
from groupdetr_fast.layers.deformable_attention import MultiScaleDeformableAttention, initialize_deformable
from groupdetr_fast.layers.deformable_decoder import DeformableDecoderLayer, boxes_in_levels
from groupdetr_fast.layers.deformable_encoder import DeformableEncoder
from groupdetr_fast.layers.deformable_levels import InputProjections, join_levels
from groupdetr_fast.layers.grouped_self_attention import GroupedSelfAttention
from groupdetr_fast.models.dino import token_anchors
from groupdetr_fast.testing import poisoned_memory

DIM, HEADS, POINTS, FEEDFORWARD, QUERIES = 256, 8, 4, 64, 9


@pytest.fixture(scope="module")
def theirs():
    """transformers' two-stage Deformable DETR with refined boxes; small, with random weights."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=DIM,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEEDFORWARD,
        decoder_ffn_dim=FEEDFORWARD,
        num_labels=5,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=QUERIES,
        num_queries=QUERIES,
        disable_custom_kernels=True,
    )
    torch.manual_seed(1)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():  # some layers start at zero, which would hide their inputs
        if re.search("bbox_embed|sampling_offsets|attention_weights", name):
            nn.init.normal_(parameter, std=0.1)
    return model


class DeformableDetr(nn.Module):
    """What transformers' model has between its backbone and its heads, from this package's layers."""

    def __init__(self, channels):
        super().__init__()
        self.input_proj = InputProjections(channels, 4, DIM)
        self.level_embed = nn.Parameter(torch.empty(4, DIM))
        sizes = {"num_levels": 4, "num_points": POINTS}
        self.encoder = DeformableEncoder(2, DIM, HEADS, FEEDFORWARD, 0.0, **sizes)
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList(DeformableDecoderLayer(DIM, HEADS, FEEDFORWARD, 0.0, **sizes) for _ in range(2))}
        )


RENAMED = (
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"(decoder.*)\.encoder_attn_layer_norm\.", r"\1.norm1."),
    (r"(decoder.*)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder.*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.mlp\.fc", ".linear"),
)


def with_weights_of(theirs):
    ours = DeformableDetr(theirs.model.backbone.intermediate_channel_sizes)
    state = {}
    for name, tensor in theirs.model.state_dict().items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for name in list(state):
        if found := re.fullmatch(r"(decoder\.layers\.\d\.self_attn)\.q_proj\.(weight|bias)", name):
            prefix, kind = found.groups()
            state[f"{prefix}.in_proj_{kind}"] = torch.cat([state[f"{prefix}.{part}_proj.{kind}"] for part in "qkv"])
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return ours.eval()


def padded_batch(size=(128, 160)):
    images = torch.randn(2, 3, *size)
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[1, 100:] = True
    masks[1, :, 120:] = True
    return images.masked_fill(masks[:, None], 0), masks


@torch.no_grad()
def test_equals_deformable_detr_of_transformers(theirs):
    ours = with_weights_of(theirs)
    images, masks = padded_batch()
    expected = theirs(images, pixel_mask=(~masks).long())
    features = [features for features, _ in theirs.model.backbone(images, ~masks)]

    maps = ours.input_proj(features)
    tokens, position, levels = join_levels(maps, masks, ours.level_embed, position_offset=-0.5)
    memory = ours.encoder(tokens, position, levels)
    valid = ~levels.padding[..., None]
    torch.testing.assert_close(memory * valid, expected.encoder_last_hidden_state * valid, rtol=1e-4, atol=1e-4)

    anchors, _ = token_anchors(levels)
    _, expected_anchors = theirs.model.gen_encoder_output_proposals(memory, levels.padding, levels.shapes)
    torch.testing.assert_close(anchors, expected_anchors, rtol=1e-4, atol=1e-4)

    # transformers' learned position of a selected query is a function of its box, the content another
    first = theirs.model(images, pixel_mask=(~masks).long())
    chosen = first.enc_outputs_class[..., 0].topk(QUERIES).indices[..., None].expand(-1, -1, 4)
    embedding = theirs.model.get_proposal_pos_embed(first.enc_outputs_coord_logits.gather(1, chosen))
    query_pos, content = theirs.model.pos_trans_norm(theirs.model.pos_trans(embedding)).chunk(2, dim=-1)
    boxes = first.init_reference_points
    groups = gd.QueryGroups(1, QUERIES)
    for index, layer in enumerate(ours.decoder["layers"]):
        content = layer(content, query_pos, boxes_in_levels(boxes, levels), memory, levels, groups)
        boxes = (theirs.bbox_embed[index](content) + torch.logit(boxes, eps=1e-5)).sigmoid()
    torch.testing.assert_close(theirs.class_embed[1](content), expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


def attention_inputs(dim, coordinates, shapes=((7, 9), (4, 5), (2, 3))):
    maps = [torch.randn(2, dim, *shape) for shape in shapes]
    masks = torch.zeros(2, 28, 36, dtype=torch.bool)
    masks[1, 20:], masks[1, :, 28:] = True, True
    tokens, _, levels = join_levels(maps, masks, torch.zeros(len(shapes), dim))
    return torch.randn(2, 6, dim), torch.rand(2, 6, len(shapes), coordinates), tokens, levels


def attention_of_transformers(ours):
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    dim = ours.value_proj.in_features
    config = transformers.DeformableDetrConfig(
        d_model=dim,
        num_feature_levels=ours.num_levels,
        disable_custom_kernels=True,
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(),  # not the default, which some versions download
    )
    theirs = module.DeformableDetrMultiscaleDeformableAttention(config, ours.num_heads, ours.num_points)
    theirs.load_state_dict(ours.state_dict())

    def attend(query, reference, tokens, levels):
        shapes = torch.tensor(levels.shapes)
        return theirs(query, ~levels.padding, tokens, None, None, reference, shapes, list(levels.shapes))[0]

    return theirs, attend


def random_attention(dim=32, num_heads=4, num_levels=3, num_points=2):
    ours = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
    for layer in (ours.sampling_offsets, ours.attention_weights):
        nn.init.normal_(layer.weight, std=0.3)
    return ours


@pytest.mark.parametrize("coordinates", [2, 4], ids=["points", "boxes"])
def test_attention_equals_transformers(coordinates):
    ours = random_attention()
    theirs, attend = attention_of_transformers(ours)
    query, reference, tokens, levels = attention_inputs(32, coordinates)
    inputs = [tensor.requires_grad_() for tensor in (query, reference, tokens)]
    out, expected = ours(*inputs, levels), attend(*inputs, levels)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), [*inputs, *ours.parameters()])
    expected_grads = torch.autograd.grad((expected * weight).sum(), [*inputs, *theirs.parameters()])
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert not grads[2][levels.padding].any()  # no gradient to padded tokens


def test_attention_starts_as_in_transformers(theirs):
    ours = MultiScaleDeformableAttention(32, 8, 3, 4)
    other, _ = attention_of_transformers(ours)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    theirs.model._init_weights(other)
    for layer in ("sampling_offsets", "attention_weights"):
        for kind in ("weight", "bias"):
            name = f"{layer}.{kind}"
            torch.testing.assert_close(ours.get_parameter(name), other.get_parameter(name))


def test_low_precision_attention_is_as_exact_as_transformers():
    """Under autocast the error against float64 is at most twice transformers'."""
    ours = random_attention()
    theirs, attend = attention_of_transformers(ours)
    query, reference, tokens, levels = attention_inputs(32, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out, other = ours(query, reference, tokens, levels), attend(query, reference, tokens, levels)
    assert out.dtype == torch.bfloat16
    theirs.double()
    exact = attend(query.double(), reference.double(), tokens.double(), levels)
    error, other_error = ((result.double() - exact).abs().max() for result in (out, other))
    assert error <= 2 * other_error


def test_initialization_keeps_that_of_deformable_attention():
    encoder = DeformableEncoder(1, 32, 4, 48, 0.0, num_levels=2, num_points=2)
    attention = encoder.layers[0].self_attn
    bias = attention.sampling_offsets.bias.clone()
    initialize_deformable(encoder)
    assert torch.equal(attention.sampling_offsets.bias, bias)
    assert not attention.sampling_offsets.weight.any()
    bound = (6 / (32 + 48)) ** 0.5
    assert 0.9 * bound < encoder.layers[0].linear1.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("channels", "num_levels", "expected"),
    [
        ((6, 10), 2, [(11, 13), (6, 7)]),
        ((6, 10), 4, [(11, 13), (6, 7), (3, 4), (2, 2)]),
        ((10,), 1, [(6, 7)]),
    ],
)
def test_input_projections(channels, num_levels, expected):
    features = {6: torch.randn(2, 6, 11, 13), 10: torch.randn(2, 10, 6, 7)}
    features = [features[size] for size in channels]
    projections = InputProjections(channels, num_levels, 16)
    maps = projections(features)
    assert [tuple(level.shape) for level in maps] == [(2, 16, *size) for size in expected]
    for index, level in enumerate(maps):
        # The first further level sees the backbone's last map, the others see the level before.
        source = [*features, features[-1], *maps[len(features) :]][index]
        torch.testing.assert_close(level, projections[index](source))
    assert not any(isinstance(layer, nn.GroupNorm) for layer in InputProjections(channels, 3, 16, norm=False).modules())


def test_levels_by_loops():
    """Padding, valid ratios, centres and anchors of every token, cell by cell."""
    sizes, shapes = [(48, 256), (32, 160)], [(12, 64), (6, 32), (3, 16)]
    masks = torch.ones(2, 48, 256, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        masks[image, :height, :width] = False
    maps = [torch.randn(2, 8, *shape) for shape in shapes]
    tokens, position, levels = join_levels(maps, masks, torch.zeros(3, 8))
    anchors, has_anchor = token_anchors(levels)
    assert levels.shapes == tuple(shapes)
    assert levels.sizes.tolist() == [[width, height] for height, width in shapes]
    assert position.shape == tokens.shape == (2, 12 * 64 + 6 * 32 + 3 * 16, 8)
    for image, (image_height, image_width) in enumerate(sizes):
        token = 0
        for level, (height, width) in enumerate(shapes):
            # Cell i looks at pixel floor(i * stride) of the mask.
            valid_height = sum(i * 48 // height < image_height for i in range(height))
            valid_width = sum(j * 256 // width < image_width for j in range(width))
            ratios = levels.valid_ratios[image, level].tolist()
            assert ratios == pytest.approx([valid_width / width, valid_height / height], rel=1e-6)
            for i in range(height):
                for j in range(width):
                    padded = i >= valid_height or j >= valid_width
                    x, y, size = (j + 0.5) / valid_width, (i + 0.5) / valid_height, 0.05 * 2**level
                    assert torch.equal(tokens[image, token], maps[level][image, :, i, j])
                    assert levels.padding[image, token] == padded
                    assert levels.centers[image, token].tolist() == pytest.approx([x, y], rel=1e-6)
                    inside = not padded and all(0.01 < value < 0.99 for value in (x, y))
                    assert has_anchor[image, token] == inside
                    box = anchors[image, token].sigmoid().tolist()
                    assert box == pytest.approx([x, y, size, size] if inside else [1.0] * 4, rel=1e-5)
                    token += 1


@torch.no_grad()
def test_padding_has_no_influence():
    """An image's tokens are the same alone and in a padded batch, whatever the padding holds."""
    encoder = DeformableEncoder(2, 32, 4, 48, 0.0, num_levels=2, num_points=2)
    for layer in encoder.layers:
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.1)
    alone = [torch.randn(1, 32, 8, 12), torch.randn(1, 32, 4, 6)]
    embedding = torch.randn(2, 32)
    tokens, position, levels = join_levels(alone, None, embedding)
    assert levels.padding is None
    expected = encoder(tokens, position, levels)
    masks = torch.ones(1, 80, 128, dtype=torch.bool)
    masks[:, :64, :96] = False
    for filling in (0.0, 1e3):
        padded = [torch.full((1, 32, 10, 16), filling), torch.full((1, 32, 5, 8), filling)]
        for small, large in zip(alone, padded, strict=True):
            large[..., : small.shape[-2], : small.shape[-1]] = small
        tokens, position, levels = join_levels(padded, masks, embedding)
        out = encoder(tokens, position, levels)
        torch.testing.assert_close(out[~levels.padding][None], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [gd.QueryGroups(3, 4), gd.QueryGroups(2, 4, 3, 2)], ids=["groups", "denoising"])
def test_grouped_self_attention_equals_masked_attention_of_torch(groups):
    ours = GroupedSelfAttention(32, 4, 0.0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    content, position = torch.randn(2, groups.length, 32), torch.randn(1, groups.length, 32)
    query = content + position
    with poisoned_memory():
        out = ours(content, position, groups)
    expected, _ = theirs(query, query, content, attn_mask=~groups.attention_mask())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
