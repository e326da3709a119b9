"""``check_groups`` on this package's detectors: nothing is found in them, and what is planted is."""

import pytest
from small_detectors import small_detector

import groupdetr_fast as gd
from groupdetr_fast import ops

MODELS = {
    "conditional_detr_r50": [{}],
    "dab_detr_r50": [{}],
    "dn_detr_r50": [{"denoising_scope": "first"}, {"denoising_scope": "every"}],
    "dab_deformable_detr_r50": [{}],
    "dino_4scale_r50": [{"denoising_scope": "first"}, {"denoising_scope": "every"}],
    "mask2former_r50": [{}],
}


@pytest.mark.parametrize(("name", "options"), [(name, each) for name, every in MODELS.items() for each in every])
def test_our_detectors_pass(name, options):
    report = gd.check_groups(small_detector(name, dropout=0.1, **options), image_size=(48, 64))
    assert report.ok, report
    assert (report.num_groups, report.queries_per_group, report.evaluation_group) == (3, 6, 0)
    first = report.outputs[0]
    assert (first.name, first.group_gradient, first.group_change, first.target_change) == ("logits", 0, 0, 0)
    assert first.own_gradient > 0
    assert report.evaluation_loss.is_of_one_group
    assert report.evaluation_loss.matched_evaluation > 0


def test_attention_without_groups_is_found(monkeypatch):
    """As if the kernel took K groups for one."""
    op = ops.grouped_attention
    from groupdetr_fast.layers import grouped_self_attention

    def ungrouped(query, key, value, groups, **kwargs):
        return op(query, key, value, gd.QueryGroups(1, query.shape[1]), **kwargs)

    monkeypatch.setattr(grouped_self_attention, "grouped_attention", ungrouped, raising=False)
    monkeypatch.setattr(ops, "grouped_attention", ungrouped)
    report = gd.check_groups(small_detector("dn_detr_r50"), image_size=(48, 64))
    faults = [fault.partition(" in ")[0].split()[0] for fault in report.faults]
    assert faults[0] == "groups"
    assert "the" in faults  # targets, by denoising queries
