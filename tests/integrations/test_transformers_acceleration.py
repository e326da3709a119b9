"""transformers' models with this package's kernels against the untouched models."""

import copy
import importlib
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers", minversion="5.23", reason="accelerate leaves older transformers alone")

from tiny_transformers import CONFIGS, GROUPS, QUERIES, inputs_of, labels_of, model_of  # noqa: E402

from groupdetr_fast import ops  # noqa: E402
from groupdetr_fast.integrations.transformers import (  # noqa: E402
    accelerate,
    acceleration,
    add_groups,
    attention,
    remove_groups,
    restore,
)

NAMES = list(CONFIGS)
WITH_ATTENTION = [name for name in NAMES if name not in ("ConditionalDetr", "DabDetr", "Eomt")]
WITH_LOSS = ["ConditionalDetr", "DabDetr", "DeformableDetr", "LwDetr", "RfDetr"]
ONLY_FLOAT32 = ["DabDetr", "DFine", "Deimv2", "Mask2Former", "OneFormer", "Eomt"]  # their own code fails in float64
UNSTEADY = ["GroundingDino", "MMGroundingDino", "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4"]
# These have no loss here, but the squares of large outputs, whose gradients only float64 resolves.
STEPS = [(name, torch.float32) for name in NAMES if name not in UNSTEADY]
STEPS += [(name, torch.float64) for name in NAMES if name not in ONLY_FLOAT32]
FORMS = ["DeformableDetr", "DFine", "RTDetrV2", "Mask2Former", "OneFormer"]  # of attention; see attention.py

pytestmark = pytest.mark.skipif(not attention.DEVICES, reason="groupdetr_fast was built without its kernels")


def step(model, inputs):
    """Loss, outputs and gradients of a step."""
    torch.manual_seed(0)  # of points at which masks are compared
    model.zero_grad()
    out = model(**inputs)
    loss = out.get("loss")
    if loss is None:
        loss = out.logits.where(out.logits.isfinite(), 0).square().sum() + out.pred_boxes.square().sum()
    loss.sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    outputs = [value.detach() for key, value in out.items() if key in ("logits", "pred_boxes", "masks_queries_logits")]
    losses = {key: value.detach() for key, value in (out.get("loss_dict") or {}).items()}
    return {"loss": loss.detach(), **losses}, outputs, gradients


def assert_same_step(step, expected_step, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    losses, outputs, gradients = step
    expected_losses, expected_outputs, expected_gradients = expected_step
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance)
    for found, expected in zip(outputs, expected_outputs, strict=True):
        largest = expected[expected.isfinite()].abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(largest, 1.0))
    largest = max(gradient.abs().max() for gradient in expected_gradients.values()).item()
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=tolerance * largest)


def exchanged_of(model):
    return [module for module in model.modules() if attention._is_exchanged(module)]


def first_attention(model, inputs):
    """The first module that projects and attends, with the arguments of its first call."""
    module = next(module for module in model.modules() if hasattr(module, "sampling_offsets"))
    caught = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    args, kwargs = caught[0]
    return module, args, {key: value for key, value in kwargs.items() if value is not None}


@pytest.mark.parametrize("counts", [(3, 1), (2,)], ids=["two images", "one image"])
@pytest.mark.parametrize(("name", "dtype"), STEPS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in STEPS])
def test_a_step_stays_the_same(name, dtype, counts):
    """One image alone also meets the layouts for which torch's batch norm permutes gradients."""
    # Grounding DINO normalises the last map over its pixels: one pixel of one image would have no variance.
    inputs = inputs_of(name, counts, size=(128, 128) if "Grounding" in name else (64, 64), dtype=dtype)
    expected = step(model_of(name).to(dtype), inputs)
    model = accelerate(model_of(name).to(dtype))
    assert bool(exchanged_of(model)) == (name in WITH_ATTENTION)
    assert_same_step(step(model, inputs), expected, dtype)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_the_op_is_what_runs(name, monkeypatch):
    calls = []
    run = ops.ms_deform_attn
    monkeypatch.setattr(ops, "ms_deform_attn", lambda *args: calls.append(args) or run(*args))
    model = accelerate(model_of(name))
    with torch.no_grad():
        model(**inputs_of(name))
    assert len(calls) == len(exchanged_of(model)) > 0
    monkeypatch.setattr(attention, "has_kernel", lambda device: False)
    with torch.no_grad():
        model(**inputs_of(name))
    assert len(calls) == len(exchanged_of(model))


@pytest.mark.parametrize(
    "family",
    [
        "deformable_detr",
        "grounding_dino",
        "lw_detr",
        "mm_grounding_dino",
        "omdet_turbo",
        "pp_doclayout_v2",
        "pp_doclayout_v3",
        "pp_doclayout_v4",
        "rf_detr",
        "rt_detr",
    ],
)
def test_the_module_of_every_family(family):
    """The one body that ten modeling files hold, here without the models around it."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = modeling.MultiScaleDeformableAttention()
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4)]
    inputs = [
        torch.randn(2, 47, 4, 8, generator=generator, dtype=torch.float64),
        torch.rand(2, 6, 4, 2, 3, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2,  # also outside of the maps
        torch.rand(2, 6, 4, 2, 3, generator=generator, dtype=torch.float64),
    ]

    def run():
        value, locations, weights = (tensor.requires_grad_() for tensor in inputs)
        out = module(value, torch.tensor(shapes), shapes, torch.tensor([0, 35]), locations, weights, 64)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    expected = run()
    assert attention.exchange(module)
    torch.testing.assert_close(run(), expected)
    attention.put_back(module)
    assert type(module) is modeling.MultiScaleDeformableAttention


@pytest.mark.parametrize("name", FORMS)
def test_where_there_is_no_kernel_their_code_runs(name, monkeypatch):
    inputs = inputs_of(name)
    _, outputs, gradients = step(model_of(name), inputs)
    model = model_of(name)
    for module in model.modules():
        attention.exchange(module)
    monkeypatch.setattr(attention, "has_kernel", lambda device: False)
    _, found, found_gradients = step(model, inputs)
    torch.testing.assert_close(found, outputs, rtol=0, atol=0)
    torch.testing.assert_close(found_gradients, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_restore_gives_back_the_model(name):
    untouched, model = model_of(name), model_of(name)
    accelerate(accelerate(model))
    assert type(model) is type(untouched)
    assert list(model.state_dict()) == list(untouched.state_dict())
    restore(restore(model))
    assert not exchanged_of(model)
    assert model.loss_function is untouched.loss_function
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))
        assert getattr(ours, "ms_deformable_attn_core", None) is getattr(theirs, "ms_deformable_attn_core", None)


@pytest.mark.parametrize("name", [*FORMS, "LwDetr"])
def test_copies_and_pickles(name):
    model = accelerate(model_of(name))
    others = [copy.deepcopy(model)]
    if name in (
        "DeformableDetr",
        "DFine",
        "RTDetrV2",
    ):  # the others hold hooks of transformers, which cannot be pickled
        others.append(pickle.loads(pickle.dumps(model)))
    inputs = inputs_of(name)
    expected = step(model, inputs)
    for other in others:
        assert len(exchanged_of(other)) == len(exchanged_of(model)) > 0
        assert_same_step(step(other, inputs), expected, torch.float32)
        assert not exchanged_of(restore(other))
    assert all(attention._is_exchanged(pickle.loads(pickle.dumps(module))) for module in exchanged_of(model))


def test_saved_and_loaded(tmp_path):
    model = accelerate(model_of("LwDetr"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not exchanged_of(loaded)
    assert_same_step(step(loaded.train(), inputs_of("LwDetr")), step(model, inputs_of("LwDetr")), torch.float32)


@pytest.mark.parametrize("name", FORMS)
def test_attention_compiles_without_graph_breaks(name):
    module, args, kwargs = first_attention(accelerate(model_of(name)), inputs_of(name))
    expected = module(*args, **kwargs)[0]
    torch._dynamo.reset()
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(*args, **kwargs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = list(module.parameters())
    gradients, expected_gradients = (torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_attention_is_exported(name):
    module, args, kwargs = first_attention(accelerate(model_of(name)).eval(), inputs_of(name))
    program = torch.export.export(module, args, kwargs)
    assert "groupdetr_fast.ms_deform_attn" in str(program.graph)
    torch.testing.assert_close(program.module()(*args, **kwargs)[0], module(*args, **kwargs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DeformableDetr", "RTDetrV2"])
def test_a_whole_model_is_compiled_and_exported(name):
    model, images = accelerate(model_of(name)).eval(), inputs_of(name)["pixel_values"]
    with torch.no_grad():
        expected = model(images).logits
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(images).graph_break_count == 0
        program = torch.export.export(model, (images,), strict=False)
        torch.testing.assert_close(program.module()(images)["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_mixed_precision(name):
    inputs = inputs_of(name)

    def loss_of(model):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss.sum()

    loss = loss_of(accelerate(model_of(name)))
    torch.testing.assert_close(loss, loss_of(model_of(name)), rtol=0.05, atol=0.0)
    loss.backward()


def test_attention_weights_are_captured():
    """RT-DETR v2's attention is found by its class."""
    options = {"pixel_values": inputs_of("RTDetrV2")["pixel_values"], "output_attentions": True}
    expected = model_of("RTDetrV2").eval()(**options).cross_attentions
    found = accelerate(model_of("RTDetrV2")).eval()(**options).cross_attentions
    assert len(found) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [(2,), (3, 0), (0, 0), (1, 9, 0)], ids=str)
@pytest.mark.parametrize("num_groups", [1, 13])
@pytest.mark.parametrize("name", WITH_LOSS)
def test_losses(name, num_groups, counts):
    """One to three images, without objects and with more objects than queries."""
    dtype = torch.float32 if name in ONLY_FLOAT32 else torch.float64
    overrides = {"group_detr": num_groups} if name in ("LwDetr", "RfDetr") else {}
    inputs = inputs_of(name, counts, dtype=dtype)
    expected = step(model_of(name, **overrides).to(dtype), inputs)
    assert_same_step(step(accelerate(model_of(name, **overrides)).to(dtype), inputs), expected, dtype)


def test_loss_of_two_stages():
    options = {"two_stage": True, "two_stage_num_proposals": QUERIES}
    inputs = inputs_of("DeformableDetr")
    expected = step(model_of("DeformableDetr", **options), inputs)
    assert_same_step(step(accelerate(model_of("DeformableDetr", **options)), inputs), expected, torch.float32)


@pytest.mark.parametrize("name", ["LwDetr", "RfDetr"])
def test_loss_of_evaluation_is_that_of_one_group(name):
    """transformers' own loss matches the one group of evaluation as K groups of N // K queries."""
    model, inputs = model_of(name, num_queries=GROUPS * QUERIES).eval(), inputs_of(name)
    with torch.no_grad():
        theirs = model(**inputs).loss
        model.config.group_detr = 1
        expected = model(**inputs).loss
        model.config.group_detr = GROUPS
        found = accelerate(model)(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (theirs - expected).abs() > 0.1


def test_with_groups():
    inputs = inputs_of("DeformableDetr")
    expected = step(add_groups(model_of("DeformableDetr"), GROUPS), inputs)
    model = accelerate(add_groups(model_of("DeformableDetr"), GROUPS))
    torch.testing.assert_close(step(model, inputs)[0]["loss"].shape, expected[0]["loss"].shape)
    assert exchanged_of(model)
    assert remove_groups(restore(model)).loss_function is model_of("DeformableDetr").loss_function
    with pytest.raises(ValueError, match="the model is accelerated: call add_groups before accelerate"):
        add_groups(accelerate(model), GROUPS)


@pytest.mark.parametrize("name", ["DeformableDetr", "LwDetr"])
def test_trainer_for_two_epochs(name, tmp_path):
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(5)
    examples = [
        {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": labels}
        for labels in labels_of((2, 1, 3, 2), generator)
    ]

    def collate(batch):
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in batch]),
            "labels": [example["labels"] for example in batch],
        }

    def trained(model, folder):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    expected = trained(model_of(name), "theirs")
    losses = trained(accelerate(model_of(name)), "ours")
    assert len(losses) == 4
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0.0)


def test_a_loss_of_ones_own_stays():
    model = model_of("ConditionalDetr")
    model.loss_function = print
    assert accelerate(model).loss_function is print
    assert restore(model).loss_function is print


@pytest.mark.parametrize("version", ["5.22.1", "5.25.0", "6.0.0.dev0"])
def test_other_versions_are_left_alone(version, monkeypatch):
    monkeypatch.setattr(acceleration, "__version__", version)
    model = model_of("LwDetr")
    with pytest.warns(
        UserWarning, match=rf"tested with transformers 5.23 to 5.24, not {version}: the model is unchanged"
    ):
        assert accelerate(model) is model
    assert not exchanged_of(model)
    assert "_loss_function" not in vars(model)


def test_without_kernels_the_model_is_left_alone(monkeypatch):
    references = {"cpu": "reference", "cuda": "reference"}
    monkeypatch.setattr(ops.serving, "kinds_of", lambda op: references)
    monkeypatch.setattr(attention, "DEVICES", frozenset())  # which is read once, when the module is imported
    model = model_of("LwDetr")
    with pytest.warns(UserWarning, match="without its compiled kernels: the model is unchanged"):
        accelerate(model)
    assert not exchanged_of(model)
    assert "_loss_function" not in vars(model)


def test_what_is_refused():
    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers, got Linear"):
        accelerate(torch.nn.Linear(1, 1))
    model = model_of("LwDetr")
    model._use_kernels = True
    with pytest.raises(ValueError, match="use_kernels=True puts other kernels in the same place"):
        accelerate(model)
    assert not exchanged_of(model)
    backbone = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(ValueError, match="ResNetModel has neither the deformable attention nor the loss"):
        accelerate(backbone)
