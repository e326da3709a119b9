"""What an eager call costs the host: every part is measured, with kernels of Triton that do nothing."""

import csv
import shutil
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from cpu import op_host
from groupdetr_fast import ops
from groupdetr_fast.ops._triton_launch import Launch

no_gpu = pytest.mark.skipif(
    shutil.which("gcc") is None or torch.cuda.is_available(), reason="needs gcc and a process without a GPU"
)


@no_gpu
def test_cpu_tensors_take_the_way_of_a_gpu_inside_alone():
    logits, classes = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    expected = ops.sigmoid_focal_loss(logits, classes)
    with op_host.on_idle_gpu():
        with mock.patch.object(Launch, "__call__", autospec=True) as launch:
            ops.sigmoid_focal_loss(logits, classes)
            with op_host.plainly():
                ops.sigmoid_focal_loss(logits, classes)
        assert launch.call_count == 2
    assert torch.equal(ops.sigmoid_focal_loss(logits, classes), expected)
    torch.testing.assert_close(torch.ops.groupdetr_fast.sigmoid_focal_loss(logits, classes, 0.25, 2.0), expected)


@no_gpu
@pytest.mark.slow
def test_every_call_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(op_host, "RESULTS", tmp_path)
    found = op_host.rows(rounds=1, sample=0.0)
    ways = {(row["op"], row["way"]) for row in found}
    assert {(call.name, way) for call in op_host.calls() for way in (op_host.HERE, op_host.PLAIN)} < ways
    of_parts = {row["op"]: row for row in found if "autograd" in row}
    assert set(of_parts) == {"grouped_attention", "cross_attention", "ms_deform_attn", "sigmoid_focal_loss"}
    assert set(op_host.PARTS) <= set(of_parts["grouped_attention"])
    assert "launch" not in of_parts["ms_deform_attn"]
    op_host.write(found)
    with (tmp_path / "op_host.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    text = op_host.text(found)
    assert all(row["op"] in text for row in found)
