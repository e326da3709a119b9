"""What attention adds to its output at the start of a training, as ``torch.nn.MultiheadAttention`` has it: nothing."""

import pytest
import torch

import groupdetr_fast as gd


@pytest.mark.parametrize(
    ("name", "least"),
    [("conditional_detr_r50", 18), ("dab_detr_r50", 18), ("dino_4scale_r50", 6), ("mask2former_r50", 18)],
)
def test_output_biases_of_attention_start_at_0(name, least):
    torch.manual_seed(0)
    model = gd.build_model(name, num_classes=3, num_groups=2)
    biases = [bias for path, bias in model.named_parameters() if path.endswith("out_proj.bias")]
    assert len(biases) >= least
    assert not any(bias.any() for bias in biases)
