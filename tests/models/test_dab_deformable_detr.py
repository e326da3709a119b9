"""DAB-Deformable-DETR: its layout, how it starts, and how it refines boxes. Its groups are tested in
test_groups_of_detectors.py."""

import math

import torch
from small_detectors import small_detector
from torch.nn import functional as F

import groupdetr_fast as gd


def test_tensors_are_those_of_the_original_repository():
    """Its files have 604, among them the box heads twice."""
    state = gd.build_model("dab_deformable_detr_r50", num_classes=91, num_groups=1).state_dict()
    twice = [key for key in state if key.startswith("bbox_embed.")]
    assert len(state) + len(twice) == 604
    assert state["tgt_embed.weight"].shape == (300, 256)
    assert state["refpoint_embed.weight"].shape == (300, 4)
    assert state["level_embed"].shape == (4, 256)
    assert state["decoder.layers.5.cross_attn.sampling_offsets.bias"].shape == (256,)


def test_starts_as_the_original_repository_does():
    model = gd.build_model("dab_deformable_detr_r50", num_classes=7, num_groups=2, backbone="conv:8-16-24")
    for index, head in enumerate(model.bbox_embed):
        assert not head.layers[-1].weight.any()
        size_bias = -2.0 if index == 0 else 0.0
        assert head.layers[-1].bias.tolist() == [0, 0, size_bias, size_bias]
    for head in model.class_embed:
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((7,), 0.01))


def plain_sine(boxes, dim):
    """Sine embedding of the coordinates y, x, w, h, one after another, by the formula of the paper's section 4.2."""
    parts = []
    for coordinate in (1, 0, 2, 3):
        for index in range(0, dim // 2, 2):
            angle = 2 * math.pi * boxes[..., coordinate] / 10000 ** (index / (dim // 2))
            parts += [angle.sin(), angle.cos()]
    return torch.stack(parts, dim=-1)


def test_decoder_equals_a_plain_loop():
    """The queries' part of the model written out for one image and one group, with torch's attention."""
    model = small_detector("dab_deformable_detr_r50", num_groups=1, decoder_layers=3).eval().double()
    images = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    out = model(images)
    memory, levels = model.encode(images, None)
    boxes = model.refpoint_embed.weight[None].sigmoid()
    content = model.tgt_embed.weight[None]
    for index, layer in enumerate(model.decoder.layers):
        position = model.decoder.ref_point_head(plain_sine(boxes, 32))
        if index > 0:
            position = position * model.decoder.query_scale(content)
        attention = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64).eval()
        attention.load_state_dict(layer.self_attn.state_dict())
        query = content + position
        content = layer.norm2(content + attention(query, query, content)[0])
        reference = boxes[:, :, None].expand(-1, -1, 4, -1)
        content = layer.norm1(content + layer.cross_attn(content + position, reference, memory, levels))
        content = layer.norm3(content + layer.linear2(F.relu(layer.linear1(content))))
        anchors = boxes.clamp(min=1e-3).log() - (1 - boxes).clamp(min=1e-3).log()
        boxes = (model.bbox_embed[index](content) + anchors).sigmoid()
        # The embedding of positions is computed in float32.
        torch.testing.assert_close(out.boxes[index], boxes, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.logits[index], model.class_embed[index](content), rtol=1e-5, atol=1e-5)


def test_no_gradient_between_the_boxes_of_layers():
    model = small_detector("dab_deformable_detr_r50", num_groups=1, decoder_layers=3)
    moves = []
    for head in model.bbox_embed:
        head.register_forward_hook(lambda _module, _inputs, output: moves.append(output))
    out = model(torch.randn(2, 3, 48, 64))
    for layer in range(3):
        loss = (out.boxes[layer] * torch.randn_like(out.boxes[layer])).sum()
        grads = torch.autograd.grad(loss, moves, retain_graph=True, allow_unused=True)
        assert [grad is not None and grad.any().item() for grad in grads] == [index == layer for index in range(3)]
