"""Groups inside torch's attention, and docs/own-detr.md, beside masks and loops that are written out."""

import copy
import re
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

import groupdetr_fast as gd
from groupdetr_fast.boxes import cxcywh_to_xyxy
from groupdetr_fast.integrations.multihead import GroupedMultiheadAttention, group_self_attention

PAGE = Path(__file__).parents[2] / "docs" / "own-detr.md"
GROUPS, QUERIES, DIM, HEADS = 3, 5, 8, 2


@pytest.fixture(scope="module")
def page():
    """The names of the program on the page, with fewer queries, after one step of it."""
    torch.manual_seed(0)
    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for program in programs:
        small = program.replace("= 11, 100, 20, 3", f"= {GROUPS}, {QUERIES}, 6, 2").replace("[3, 7]", "[3, 5]")
        exec(compile(small, str(PAGE), "exec"), names)
    return names


def plain_and_grouped(**options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    holder = nn.ModuleDict({"self_attn": copy.deepcopy(plain)})
    grouped = group_self_attention(holder, QUERIES)["self_attn"]
    assert isinstance(grouped, GroupedMultiheadAttention)
    return plain, grouped


def masked(attention, query, key, value, num_groups):
    """Torch's attention, with a mask of all queries by all queries."""
    visible = gd.QueryGroups(num_groups, QUERIES).attention_mask()
    return attention(query, key, value, attn_mask=~visible, need_weights=False)[0]


@pytest.mark.parametrize("num_groups", [1, GROUPS])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=["DETR", "batch_first", "bias"])
def test_it_is_attention_with_a_mask(num_groups, options):
    plain, grouped = plain_and_grouped(**options)
    length = num_groups * QUERIES
    shape = (2, length, DIM) if options.get("batch_first") else (length, 2, DIM)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape, dtype=torch.float64)
    results = []
    for attention, out in ((plain, masked(plain, *inputs, num_groups)), (grouped, grouped(*inputs)[0])):
        out.backward(upstream)
        gradients = [*inputs, *attention.parameters()]
        results.append([out.detach(), *(each.grad for each in gradients)])
        for each in inputs:
            each.grad = None
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_one_sequence_without_a_batch():
    plain, grouped = plain_and_grouped()
    query = torch.randn(GROUPS * QUERIES, DIM, dtype=torch.float64)
    torch.testing.assert_close(grouped(query, query, query)[0], masked(plain, query, query, query, GROUPS))


def test_what_is_exchanged():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, DIM), 2)
    keys = list(decoder.state_dict())
    parameters = list(map(id, decoder.parameters()))
    assert group_self_attention(decoder, QUERIES) is decoder
    assert list(decoder.state_dict()) == keys
    assert list(map(id, decoder.parameters())) == parameters
    for layer in decoder.layers:
        assert type(layer.self_attn) is GroupedMultiheadAttention
        assert type(layer.multihead_attn) is nn.MultiheadAttention
    built = GroupedMultiheadAttention(DIM, HEADS, queries_per_group=QUERIES)
    assert built.state_dict().keys() == decoder.layers[0].self_attn.state_dict().keys()


def test_what_does_not_fit_is_refused():
    _, grouped = plain_and_grouped()
    query = torch.randn(2 * QUERIES, 1, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"whole groups of 5, got 9 in \[9, 1, 8\] \(\[L, B, d\]\)"):
        grouped(query[:9], query[:9], query[:9])
    with pytest.raises(ValueError, match="this is self-attention"):
        grouped(query, query[:5], query[:5])
    with pytest.raises(ValueError, match="takes no mask"):
        grouped(query, query, query, attn_mask=torch.zeros(10, 10))
    with pytest.raises(ValueError, match=r"has no torch\.nn\.MultiheadAttention called self_attn"):
        group_self_attention(nn.Linear(2, 2), 5)
    with pytest.raises(ValueError, match=r"encoder.layers.0 is an encoder, .*: pass the decoder alone"):
        group_self_attention(nn.Transformer(DIM, HEADS, 1, 1, DIM), 5)
    with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
        GroupedMultiheadAttention(DIM, HEADS, queries_per_group=0)
    with pytest.raises(ValueError, match="has no add_bias_kv"):
        GroupedMultiheadAttention(DIM, HEADS, queries_per_group=5, add_bias_kv=True)


class OwnAttention(nn.MultiheadAttention):
    """Computes something else."""

    def forward(self, query, *_, **__):
        return query, None


@pytest.mark.parametrize("kind", [OwnAttention, torch.ao.nn.quantizable.MultiheadAttention])
def test_attention_that_is_not_torchs_own_is_refused(kind):
    decoder = nn.ModuleDict({"self_attn": nn.MultiheadAttention(DIM, HEADS)})
    holder = nn.ModuleList([decoder, nn.ModuleDict({"self_attn": kind(DIM, HEADS)})])
    with pytest.raises(ValueError, match=rf"1\.self_attn is a {kind.__module__}\.{kind.__qualname__}, "):
        group_self_attention(holder, QUERIES)
    assert type(decoder["self_attn"]) is nn.MultiheadAttention
    group_self_attention(decoder, QUERIES)
    assert group_self_attention(decoder, 2 * QUERIES)["self_attn"].queries_per_group == 2 * QUERIES


def written_out(names, model, images, targets):
    """The loss of the page's step: masks, scipy, loops over layers, images and groups."""
    classes = names["CLASSES"]
    plain = copy.deepcopy(model)
    for layer in plain.decoder.layers:
        layer.self_attn.__class__ = nn.MultiheadAttention
    mask = ~gd.QueryGroups(GROUPS, QUERIES).attention_mask()
    hidden = plain.queries.weight.expand(len(images), -1, -1)
    memory = plain.backbone(images).flatten(2).mT
    boxes_of_all = max(sum(len(each["labels"]) for each in targets), 1)
    total = 0
    for layer in plain.decoder.layers:
        hidden = layer(hidden, memory, tgt_mask=mask)
        logits, boxes = plain.class_head(hidden), plain.box_head(hidden).sigmoid()
        for image, target in enumerate(targets):
            labels, wanted = target["labels"], target["boxes"].to(boxes.dtype)
            for group in range(GROUPS):
                rows = slice(group * QUERIES, (group + 1) * QUERIES)
                scores, found = logits[image, rows], boxes[image, rows]
                giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
                one_hot = torch.zeros_like(scores)
                if len(labels):
                    each = [sigmoid_focal_loss(scores, torch.full_like(scores, truth)) for truth in (1.0, 0.0)]
                    cost = 2 * (each[0] - each[1])[:, labels] + 5 * torch.cdist(found, wanted, p=1) - 2 * giou
                    query, index = linear_sum_assignment(cost.detach().numpy())
                    one_hot[query, labels[index]] = 1
                    total = total + 5 * (found[query] - wanted[index]).abs().sum()
                    total = total + 2 * (1 - giou[query, index]).sum()
                assert one_hot.shape[1] == classes
                total = total + 2 * sigmoid_focal_loss(scores, one_hot, reduction="sum")
    return total / (GROUPS * boxes_of_all), plain


def without_dropout(model):
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model.zero_grad()
    return model


def test_the_page_computes_what_is_written_out(page):
    model, images = without_dropout(page["model"]), page["images"].double()
    losses = page["criterion"](model(images), page["targets"])
    loss = sum(weight * losses[name] for name, weight in page["weights"].items())
    expected, plain = written_out(page, model, images, page["targets"])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name)
    report = gd.check_groups(model.float())
    assert (report.ok, report.num_groups, report.queries_per_group) == (True, GROUPS, QUERIES)
    model.eval()
    first = model(images.float())["pred_logits"]
    assert first.shape[1] == QUERIES
    torch.testing.assert_close(first, model.train()(images.float())["pred_logits"][:, :QUERIES])


def test_dropout_is_the_same_where_a_layer_is_computed_again(page):
    model, images = copy.deepcopy(page["model"]), page["images"]
    layer = model.decoder.layers[0]
    layer.self_attn.dropout = 0.5
    hidden = model.queries.weight.expand(len(images), -1, -1)
    memory = model.backbone(images).flatten(2).mT.detach()
    gradients = []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        out = checkpoint(layer, hidden, memory, use_reentrant=False) if again else layer(hidden, memory)
        out.square().sum().backward(retain_graph=True)
        gradients.append([each.grad.clone() for each in layer.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    assert layer.self_attn.in_proj_weight.grad.abs().max() > 0


def test_in_half_precision_and_compiled(page):
    model, images = without_dropout(page["model"]).float(), page["images"]
    expected = model(images)["pred_logits"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)["pred_logits"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images)["pred_logits"], expected)
