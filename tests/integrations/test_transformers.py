"""Group training of transformers' models against the untouched models and their own losses."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from tiny_transformers import CLASSES, model_of  # noqa: E402
from tiny_transformers import QUERIES as SIZE  # noqa: E402

from groupdetr_fast.integrations.transformers import add_groups, remove_groups  # noqa: E402

NAMES = ["ConditionalDetr", "DabDetr", "DeformableDetr"]
GROUPS = 3


def queries_of(model):
    return (
        model.model.query_refpoint_embeddings if hasattr(model, "query_dim") else model.model.query_position_embeddings
    )


@pytest.fixture
def batch():
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 48:] = 0
    mask[1, :, 64:] = 0
    labels = [
        {"class_labels": torch.tensor([0, 2, 3]), "boxes": torch.rand(3, 4) * 0.3 + 0.2},
        {"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.3 + 0.2},
    ]
    return {"pixel_values": torch.randn(2, 3, 64, 96) * mask[:, None], "pixel_mask": mask, "labels": labels}


def assert_same_output(out, expected, **tolerance):
    torch.testing.assert_close(out.loss, expected.loss, **tolerance)
    torch.testing.assert_close(out.logits, expected.logits, **tolerance)
    torch.testing.assert_close(out.pred_boxes, expected.pred_boxes, **tolerance)
    assert set(out.loss_dict) == set(expected.loss_dict)
    for key, value in expected.loss_dict.items():
        torch.testing.assert_close(out.loss_dict[key], value, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_groups_begin_near_the_models_queries_if_asked(name):
    model = model_of(name)
    own = queries_of(model).weight.detach().clone()
    first, *others = queries_of(add_groups(model, GROUPS, noise=0.1)).weight.detach().chunk(GROUPS)
    assert torch.equal(first, own)
    for group in others:
        assert ((group - own).std() / own.std()).item() == pytest.approx(0.1, rel=0.4)  # of few numbers
    model = model_of(name)
    with pytest.raises(ValueError, match="noise must not be negative, got -1"):
        add_groups(model, GROUPS, noise=-1)
    assert len(queries_of(model).weight) == SIZE
    assert torch.equal(queries_of(add_groups(model, GROUPS, noise=0.0)).weight, own.repeat(GROUPS, 1))


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_one_group_is_the_untouched_model(name, auxiliary_loss, batch):
    model = model_of(name, auxiliary_loss=auxiliary_loss)
    expected = model(**batch)
    expected_gradients = torch.autograd.grad(expected.loss, queries_of(model).weight)
    out = add_groups(model, 1)(**batch)
    assert_same_output(out, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out.loss, queries_of(model).weight)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    assert (out.auxiliary_outputs is None) == (expected.auxiliary_outputs is None)


@pytest.mark.parametrize("name", NAMES)
def test_groups_together_equal_groups_alone(name, batch):
    """In training every group computes what a model with its queries alone computes; the loss is the mean."""
    model = add_groups(model_of(name), GROUPS)
    together = model(**batch)
    assert together.logits.shape == (2, GROUPS * SIZE, CLASSES)
    losses = []
    for group in range(GROUPS):
        alone = remove_groups(copy.deepcopy(model), group)(**batch)
        rows = slice(group * SIZE, (group + 1) * SIZE)
        torch.testing.assert_close(together.logits[:, rows], alone.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pred_boxes[:, rows], alone.pred_boxes, rtol=1e-5, atol=1e-5)
        losses.append(alone.loss)
    assert (losses[0] - losses[1]).abs() > 1e-3
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_groups_and_images_are_isolated(name, batch):
    model = add_groups(model_of(name), GROUPS)
    batch["pixel_values"].requires_grad_()
    out = model(**batch)
    weight = queries_of(model).weight
    for group in range(GROUPS):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        of_group = (out.logits[:, rows].square().sum() + out.pred_boxes[:, rows].square().sum()).sum()
        (gradient,) = torch.autograd.grad(of_group, weight, retain_graph=True)
        assert gradient[rows].abs().amax(1).gt(0).all()
        gradient[rows] = 0
        assert not gradient.any()
    of_image = out.logits[0].square().sum() + out.pred_boxes[0].square().sum()
    (gradient,) = torch.autograd.grad(of_image, batch["pixel_values"])
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_inference_and_the_model_handed_back(name, group, batch, tmp_path):
    """Group 0 is bit for bit the model that came; the model handed back is what evaluation computed before."""
    model = model_of(name).eval()
    names, expected = list(model.state_dict()), model(**batch)
    add_groups(model, GROUPS, inference_group=group)
    assert list(model.state_dict()) == names
    out = model(**batch)
    remove_groups(model, group)
    again = model(**batch)
    assert_same_output(again, out, rtol=1e-5, atol=1e-5)  # the losses differ by their order of summation
    assert torch.equal(out.logits, again.logits)
    assert torch.equal(out.pred_boxes, again.pred_boxes)
    assert torch.equal(out.logits, expected.logits) == (group == 0)
    assert torch.equal(out.pred_boxes, expected.pred_boxes) == (group == 0)

    untouched = model_of(name)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in untouched.state_dict().items()
    }
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, again.logits)


@pytest.mark.parametrize("name", NAMES)
def test_new_groups_are_not_copies(name):
    model = model_of(name)
    before = queries_of(model).weight.detach().clone()
    rows = queries_of(add_groups(model, GROUPS)).weight
    assert torch.equal(rows[:SIZE], before)
    assert len(rows.unique(dim=0)) == GROUPS * SIZE
    assert 0.5 < rows[SIZE:].std() < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_batch(name, batch):
    model = add_groups(model_of(name), GROUPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("num_groups", [1, GROUPS])
def test_dropout_of_self_attention(num_groups, batch):
    model = model_of("ConditionalDetr", encoder_layers=0)
    for layer in model.model.decoder.layers:
        layer.self_attn.attention_dropout = 0.5
    add_groups(model, num_groups)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name, batch):
    model = add_groups(model_of(name), GROUPS)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    gradient = queries_of(model).weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.any(1).all()


@pytest.mark.parametrize("name", ["ConditionalDetr", "DeformableDetr"])  # DAB-DETR supports none
def test_gradient_checkpointing(name, batch):
    model = add_groups(model_of(name), GROUPS)
    expected = torch.autograd.grad(model(**batch).loss, queries_of(model).weight)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(torch.autograd.grad(model(**batch).loss, queries_of(model).weight), expected)


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights(name, batch):
    """Of several groups there are none; of one group there are the model's own."""
    model = add_groups(model_of(name, attn_implementation="eager"), GROUPS)
    assert all(weights is None for weights in model(**batch, output_attentions=True).decoder_attentions)
    weights = model.eval()(**batch, output_attentions=True).decoder_attentions
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, SIZE, SIZE)] * 2


def test_frozen_model_can_train_its_groups(batch):
    """Groups follow the module of the queries, so that the rest may be in evaluation mode."""
    model = add_groups(model_of("ConditionalDetr"), GROUPS).eval()
    queries_of(model).train()
    assert model(**batch).logits.shape[1] == GROUPS * SIZE


def trainer_of(model, batch, folder, **options):
    """A ``Trainer`` of two batches an epoch, each of both images, that saves every step."""
    pytest.importorskip("accelerate")
    images = [
        {"pixel_values": batch["pixel_values"][index], "labels": batch["labels"][index]} for index in (0, 1, 0, 1)
    ]

    def collate(examples):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": [example["labels"] for example in examples],
        }

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        save_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=images, eval_dataset=images, data_collator=collate
    )


@pytest.mark.parametrize("name", NAMES)
def test_trainer(name, batch, tmp_path):
    model = add_groups(model_of(name), GROUPS)
    before = queries_of(model).weight.detach().clone()
    trainer = trainer_of(model, batch, tmp_path, max_steps=2)
    assert trainer.train().global_step == 2
    assert (queries_of(model)._parameters["weight"] != before).any(1).all()
    assert trainer.evaluate()["eval_loss"] > 0
    remove_groups(model, 1)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_ends_as_one_without_interruption(name, batch, tmp_path):
    """In a model that is built anew, with other weights. transformers itself leaves half of them as they are."""
    model = add_groups(model_of(name), GROUPS)
    trainer_of(model, batch, tmp_path, max_steps=3).train()
    other = model_of(name)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    add_groups(other, GROUPS)
    resumed = trainer_of(other, batch, tmp_path / "resumed", max_steps=3)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 3
    expected = model.state_dict()
    differing = [key for key, value in other.state_dict().items() if not torch.equal(value, expected[key])]
    assert differing == []


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_are_loaded_into_copies_and_under_their_own_names_too(name, tmp_path):
    model = add_groups(model_of(name), GROUPS)
    model.save_pretrained(tmp_path)
    saved, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert (saved.keys() <= own.keys()) == (name == "DabDetr")  # whose names did not change
    for state in (saved, own):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        assert not other.load_state_dict(state, strict=False).unexpected_keys
        assert all(torch.equal(value, own[key]) for key, value in other.state_dict().items())
    assert not remove_groups(other)._load_state_dict_pre_hooks


def test_what_is_not_supported_is_refused():
    with pytest.raises(TypeError, match=r"model must be one of .*DabDetrForObjectDetection.*, got Linear"):
        add_groups(torch.nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="two_stage must be False"):
        add_groups(model_of("DeformableDetr", two_stage=True), 2)
    with pytest.raises(ValueError, match="num_patterns must be 0, got 2"):
        add_groups(model_of("DabDetr", num_patterns=2), 2)
    model = model_of("ConditionalDetr")
    for number in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"num_groups must be an integer of at least 1, got {number}"):
            add_groups(model, number)
    with pytest.raises(ValueError, match=r"inference_group must be in \[0, 2\), got 2"):
        add_groups(model, 2, inference_group=2)
    with pytest.raises(ValueError, match="the model has no groups"):
        remove_groups(model)
    add_groups(model, 2)
    with pytest.raises(ValueError, match="the model has 2 groups already"):
        add_groups(model, 2)
    with pytest.raises(RuntimeError, match=r"weights of 3 groups of \d+ queries, and the model has 2: call add_groups"):
        model.load_state_dict(add_groups(model_of("ConditionalDetr"), 3).state_dict())
    with pytest.raises(ValueError, match=r"group must be in \[0, 2\), got -1"):
        remove_groups(model, -1)
    remove_groups(model).loss_function = print
    with pytest.raises(ValueError, match="a loss function of its own"):
        add_groups(model, 2)


def test_without_transformers_the_import_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in list(sys.modules):
        if module.startswith("groupdetr_fast.integrations.transformers"):
            monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"integrations.transformers needs transformers 5.2 or newer"):
        import groupdetr_fast.integrations.transformers  # noqa: F401
