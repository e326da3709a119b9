"""Groups of queries in the training of Ultralytics' RT-DETR."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from tiny_ultralytics import (
    CLASSES,
    COUNTS,
    QUERIES,
    assert_same_step,
    batch_of,
    folder_of,
    model_of,
    options_of,
    step,
    train,
)
from torch import nn
from ultralytics import RTDETR
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.utils.loss import RTDETRDetectionLoss
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.nn.tasks import RTDETRDetectionModel, torch_safe_load
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file
from ultralytics.utils.patches import torch_load

from groupdetr_fast.integrations.ultralytics import (
    AcceleratedTrainer,
    accelerate,
    criterion,
    group_trainer,
    group_training,
    parts,
    restore,
)
from groupdetr_fast.integrations.ultralytics.groups import add_groups, has_groups, heads_of_others, remove_groups

K = 3


@pytest.fixture(autouse=True)
def _any_version(monkeypatch):
    """The tests say whether another version works, too."""
    monkeypatch.setattr(parts, "__version__", "8.4.190")


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path)


def grouped(noise=None, **options):
    model = model_of(**options)
    torch.manual_seed(5)
    add_groups(model, K, noise=noise)
    return accelerate(model)


def predict(model, batch):
    """What a model in training predicts for a batch, with denoising queries."""
    torch.manual_seed(3)
    targets = {
        "cls": batch["cls"].long().view(-1),
        "bboxes": batch["bboxes"],
        "batch_idx": batch["batch_idx"].long(),
        "gt_groups": batch["batch_idx"].long().bincount(minlength=len(batch["img"])).tolist(),
    }
    return model.predict(batch["img"], batch=targets), targets


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=str)
def test_groups_do_not_see_each_other(counts, learnt):
    """Group 0 and the denoising queries predict as in the base model, and so does each other group by its heads."""
    model, base = (build(learnt=learnt) for build in (grouped, model_of))
    batch = batch_of(counts)
    found, expected = (predict(each, batch)[0] for each in (model, base))
    first = expected[0].shape[2]
    assert found[0].shape[2] == first + (K - 1) * QUERIES
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours[:, :, :first], theirs, rtol=1e-5, atol=1e-5)
    for group in range(1, K):
        alone = copy.deepcopy(base)
        for name, heads in heads_of_others(model)[group - 1].items():
            alone.model[-1]._modules[name] = copy.deepcopy(heads)
        expected = predict(alone, batch)[0]
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            rows = slice(first + (group - 1) * QUERIES, first + group * QUERIES)
            torch.testing.assert_close(ours[:, :, rows], theirs[:, :, -QUERIES:], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found[2:4], expected[2:4], strict=True):
            torch.testing.assert_close(ours[:, group * QUERIES : (group + 1) * QUERIES], theirs)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_losses_are_means_over_groups(counts):
    """Of Ultralytics' own criterion for each group alone."""
    model, batch = grouped(), batch_of(counts)
    (boxes, logits, first_boxes, first_logits, denoising), targets = predict(model, batch)
    length = denoising["dn_num_split"][0] if denoising else 0
    theirs = model_of().init_criterion()
    expected = []
    for group in range(K):
        rows = slice(group * QUERIES, (group + 1) * QUERIES)
        layers = [
            torch.cat((first[None, :, rows], every[:, :, length:][:, :, rows]))
            for first, every in ((first_boxes, boxes), (first_logits, logits))
        ]
        of_denoising = {"dn_bboxes": boxes[:, :, :length], "dn_scores": logits[:, :, :length], "dn_meta": denoising}
        expected.append(theirs(layers, targets, **(of_denoising if denoising else {})))
    total = sum(sum(losses.values()) for losses in expected) / K
    torch.manual_seed(3)
    loss, shown = model(batch)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for name, key in (("giou_loss", "loss_giou"), ("cls_loss", "loss_class"), ("l1_loss", "loss_bbox")):
        torch.testing.assert_close(shown[name], sum(losses[key] for losses in expected).detach() / K)


class OtherCriterion(RTDETRDetectionLoss):
    pass


@pytest.mark.parametrize(
    "build",
    [
        lambda: RTDETRDetectionLoss(nc=CLASSES, use_vfl=True, use_uni_match=True),
        lambda: RTDETRDetectionLoss(nc=CLASSES, use_vfl=False),
        lambda: OtherCriterion(nc=CLASSES, use_vfl=True),
    ],
)
def test_criteria_that_would_match_all_groups_as_one(build, monkeypatch):
    monkeypatch.setattr(RTDETRDetectionModel, "init_criterion", lambda model: build())
    with pytest.raises(ValueError, match="groups of queries need the criterion as Ultralytics' RT-DETR has it"):
        step(grouped(), batch_of((3, 1)))
    assert step(model_of(), batch_of((3, 1)))[0]["loss"] > 0


def test_groups_are_matched_on_a_device_without_a_kernel(monkeypatch):
    expected = step(grouped(), batch_of((3, 1)))
    monkeypatch.setattr(criterion, "serves", lambda op, device: False)
    assert_same_step(step(grouped(), batch_of((3, 1))), expected, 0)


def test_a_model_with_groups_keeps_its_classes():
    """Those of the base model would take all groups for one."""
    model = grouped()
    for part in (model, model.model[-1], model.model[-1].decoder.layers[0].self_attn):
        with pytest.raises(TypeError, match="cannot take the class Sharded: remove its groups first"):
            part.__class__ = type("Sharded", (part.__class__,), {})
        assert type(copy.copy(part)) is type(part)


def test_every_group_learns_on_its_own():
    model = grouped()
    _, gradients = step(model, batch_of((3, 1)))
    names = [f"model.4.other_groups.{group}.enc_output.0.weight" for group in range(K - 1)]
    assert all(gradients[name].abs().max() > 0 for name in names)
    assert not torch.allclose(*(gradients[name] for name in names))


def test_one_group_is_the_base_model():
    model, batch = model_of(), batch_of((3, 1))
    add_groups(model, 1)
    assert type(model) is RTDETRDetectionModel
    assert_same_step(step(accelerate(model), batch), step(model_of(), batch), 1e-5)


def test_half_precision_of_autocast():
    def loss_of(model, enabled):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model(batch_of((3, 1)))[0]

    found = loss_of(grouped(), True)
    found.backward()
    torch.testing.assert_close(found, loss_of(grouped(), False), rtol=5e-2, atol=0)


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)], ids=str)
def test_ddp_finds_every_parameter_used(counts, tmp_path):
    """As Ultralytics wraps the model, but for unused parameters, which it would take; of one process."""
    expected = step(grouped(), batch_of(counts))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(grouped(), find_unused_parameters=False)
        losses, gradients = step(model, batch_of(counts))
    finally:
        dist.destroy_process_group()
    gradients = {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
    assert_same_step((losses, gradients), expected, 1e-6)
    assert len(gradients) == len(list(grouped().parameters()))


def test_evaluation_is_that_of_the_first_group():
    model, base, batch = grouped().eval(), model_of().eval(), batch_of((3, 1))
    with torch.no_grad():
        found, expected = model(batch["img"]), base(batch["img"])
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.loss(batch, found), base.loss(batch, expected), rtol=1e-5, atol=1e-5)


def test_groups_near_a_trained_one():
    model = grouped(noise=0.1)
    own, others = model.model[-1].enc_score_head.weight, heads_of_others(model)
    for heads in others:
        difference = (heads["enc_score_head"].weight - own).std() / own.std()
        assert 0.05 < difference < 0.2
    assert not torch.equal(others[0]["enc_score_head"].weight, others[1]["enc_score_head"].weight)


def test_pickles_have_the_first_group_in_their_classes():
    model = grouped()
    step(model, batch_of((3, 1)))
    data = pickle.dumps(model)
    assert b"groupdetr_fast" not in data
    again, base = pickle.loads(data), model_of()
    assert list(again.state_dict()) == list(base.state_dict())
    assert {type(part) for part in again.modules()} - {type(again.criterion)} >= {type(part) for part in base.modules()}
    assert "num_groups" not in vars(again.model[-1].decoder.layers[0].self_attn)
    twin = copy.deepcopy(model)
    assert has_groups(twin)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert len(list(model.state_dict())) > len(list(again.state_dict()))


def test_removing_groups():
    model, base = grouped(), model_of()
    remove_groups(model)
    remove_groups(model)
    for ours, theirs in zip(model.modules(), accelerate(base).modules(), strict=True):
        assert ours.__class__ is theirs.__class__
        assert set(vars(ours)) - {"criterion"} == set(vars(theirs))
    assert_same_step(step(model, batch_of((3, 1))), step(base, batch_of((3, 1))), 1e-5)


def test_restoring_after_a_training_that_was_broken_off(folder):
    RTDETR(folder / "rtdetr-tiny.yaml").save(folder / "pretrained.pt")
    detector = RTDETR(folder / "pretrained.pt")

    def interrupt(trainer):
        raise KeyboardInterrupt

    detector.add_callback("on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        detector.train(**options_of(folder, "run"), epochs=1, trainer=group_trainer(K))
    assert has_groups(detector.model)
    restore(detector)
    untouched = model_of()
    assert list(detector.model.state_dict()) == list(untouched.state_dict())
    parts = zip(detector.model.modules(), untouched.modules(), strict=False)
    assert all(type(ours) is type(theirs) for ours, theirs in parts)


def test_a_checkpoint_of_one_group_leaves_the_others():
    model = grouped()
    others = {name: value.clone() for name, value in heads_of_others(model).state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in model_of().state_dict().items()}
    model.load_state_dict(state)
    assert not model.model[-1].enc_score_head.weight.any()
    torch.testing.assert_close(dict(heads_of_others(model).state_dict()), others)


def test_classes_of_trainers():
    trainer = group_trainer(5)
    assert trainer is group_trainer(5)
    assert issubclass(trainer, AcceleratedTrainer)
    assert trainer.num_groups == 5
    assert pickle.loads(pickle.dumps(trainer)) is trainer
    for wrong in (0, -1, 2.0, "3", True):
        with pytest.raises(ValueError, match="num_groups must be an integer of at least 1, got"):
            group_trainer(wrong)
    assert group_training.GroupTrainer7 is group_trainer(7)
    for name in ("GroupTrainer", "GroupTrainer0", "GroupTrainer07", "GroupTrainerX"):
        with pytest.raises(AttributeError, match=f"has no attribute {name}$"):
            getattr(group_training, name)


def test_training(folder):
    losses, detector = train(folder, "run", trainer=group_trainer(K))
    assert len(losses) == 2
    trainer = detector.trainer
    assert has_groups(trainer.model)
    assert has_groups(trainer.ema.ema)
    assert type(detector.model) is RTDETRDetectionModel
    weights = folder / "runs" / "run" / "weights"
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "last.pt"]
    for name in ("best", "last"):
        checkpoint, _ = torch_safe_load(weights / f"{name}.pt", safe_only=True)
        assert list(checkpoint["model"].state_dict()) == list(RTDETR(folder / "rtdetr-tiny.yaml").model.state_dict())
        assert type(checkpoint["model"].model[-1]) is RTDETRDecoder


def test_training_with_one_group(folder):
    expected, _ = train(folder, "accelerated", trainer=AcceleratedTrainer)
    found, _ = train(folder, "grouped", trainer=group_trainer(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_from_a_checkpoint_groups_begin_near_the_first(folder):
    RTDETR(folder / "rtdetr-tiny.yaml").save(folder / "pretrained.pt")
    kept = []
    detector = RTDETR(folder / "pretrained.pt")
    detector.add_callback("on_train_start", lambda trainer: kept.append(copy.deepcopy(trainer.model)))
    detector.train(**options_of(folder, "run"), epochs=1, trainer=group_trainer(K))
    (model,) = kept
    own, other = model.model[-1].enc_output[0].weight, heads_of_others(model)[0]["enc_output"][0].weight
    assert 0 < (other - own).abs().max() < 0.6 * own.abs().max()


def stop_after(epoch, detector, **options):
    """As if the process had ended there; the trainer."""

    def stop(trainer):
        trainer.stop = trainer.epoch == epoch
        trainer.final_eval = lambda: None

    detector.add_callback("on_fit_epoch_end", stop)
    detector.train(**options)
    return detector.trainer


def stop_after_first_epoch(folder, name, trainer, **options):
    detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
    return stop_after(0, detector, **options_of(folder, name), epochs=4, trainer=trainer, **options)


def heads_in(model):
    return {name: value.clone() for name, value in heads_of_others(model).state_dict().items()}


def resume(last, num_groups=K):
    """The trainer of one more epoch, and the other groups that it began with."""
    begun = []
    detector = RTDETR(last)
    detector.add_callback("on_train_start", lambda trainer: begun.append(heads_in(trainer.model)))
    epoch = torch_load(last, map_location="cpu")["epoch"] + 1
    return stop_after(epoch, detector, resume=True, trainer=group_trainer(num_groups)), begun[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming(folder):
    """The groups that the checkpoint leaves out come from the file beside it."""
    stopped = stop_after_first_epoch(folder, "run", group_trainer(K))
    last = folder / "runs" / "run" / "weights" / "last.pt"
    assert list(torch_load(last, map_location="cpu")["ema"].state_dict()) == list(model_of().state_dict())
    kept = []

    def keep(trainer):
        kept.extend(copy.deepcopy(each) for each in (trainer.model, trainer.ema.ema))

    detector = RTDETR(last)
    detector.add_callback("on_train_start", keep)
    detector.train(resume=True, trainer=group_trainer(K))
    assert detector.trainer.start_epoch == 1
    expected = heads_of_others(stopped.ema.ema).state_dict()
    for model in kept:
        torch.testing.assert_close(dict(heads_of_others(model).state_dict()), dict(expected))
    assert not (last.parent / "groups_of_last.pt").exists()


def test_resuming_from_a_copy(folder):
    """Its own groups are those beside it, though the run has gone on since, or another one has taken its name."""
    expected = heads_in(stop_after_first_epoch(folder, "run", group_trainer(K)).ema.ema)
    weights, copied = folder / "runs" / "run" / "weights", folder / "copied"
    shutil.copytree(weights, copied)
    resume(weights / "last.pt")
    resume(weights / "last.pt")
    _, begun = resume(copied / "last.pt")
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)
    stop_after_first_epoch(folder, "run", group_trainer(K), exist_ok=True, seed=7)
    _, begun = resume(copied / "last.pt")
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [False, True])
def test_a_process_that_ends_while_it_saves(folder, copied, monkeypatch):
    """The groups of the checkpoint that is still there are still there."""
    expected = heads_in(stop_after_first_epoch(folder, "run", group_trainer(K)).ema.ema)
    last = folder / "runs" / "run" / "weights" / "last.pt"
    source = last
    if copied:
        shutil.copytree(last.parent, folder / "copied")
        source = folder / "copied" / "last.pt"
        expected = heads_in(resume(last)[0].ema.ema)

    def killed(trainer):
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RTDETRTrainer, "save_model", killed)
        with pytest.raises(OSError, match="killed"):
            resume(source)
    _, begun = resume(last)
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)


def test_a_checkpoint_that_was_not_saved(folder, monkeypatch):
    """Ultralytics leaves out some epochs, and the groups of last.pt stay."""
    expected = heads_in(stop_after_first_epoch(folder, "run", group_trainer(K)).ema.ema)
    last = folder / "runs" / "run" / "weights" / "last.pt"
    with monkeypatch.context() as patched:
        patched.setattr(RTDETRTrainer, "save_model", lambda trainer: False)
        detector = RTDETR(last)
        assert stop_after(2, detector, resume=True, trainer=group_trainer(K)).epoch == 2
    _, begun = resume(last)
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)


@pytest.mark.parametrize("also_model", [False, True])
def test_averages_that_are_not_finite(folder, also_model):
    """What Ultralytics puts in their place is in the file, too; and zeros where the model's are not finite either."""

    def poison(trainer):
        heads = [trainer.ema.ema.model[-1], heads_of_others(trainer.ema.ema)[0]]
        heads += [heads_of_others(trainer.model)[0]] if also_model else []
        with torch.no_grad():
            for each in heads:
                dict(each.named_modules())["enc_score_head"].weight[0, 0] = torch.nan

    detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
    detector.add_callback("on_train_epoch_end", poison)
    options = {"epochs": 4, "val": False, "trainer": group_trainer(K)}
    stopped = stop_after(0, detector, **options_of(folder, "run"), **options)
    expected = {name: value.nan_to_num() for name, value in heads_in(stopped.ema.ema).items()}
    assert also_model or all(value.isfinite().all() for value in heads_in(stopped.ema.ema).values())
    _, begun = resume(folder / "runs" / "run" / "weights" / "last.pt")
    torch.testing.assert_close(begun, expected, rtol=0, atol=0)


def test_a_folder_that_was_removed(folder):
    detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
    detector.add_callback("on_train_epoch_end", lambda trainer: shutil.rmtree(trainer.wdir))
    stop_after(0, detector, **options_of(folder, "run"), epochs=4, trainer=group_trainer(K))
    names = [path.name for path in (folder / "runs" / "run" / "weights").iterdir()]
    assert sorted(names) == ["best.pt", "groups_of_last.pt", "last.pt"]


def test_the_function_itself_is_no_trainer(folder):
    before = contents(folder)
    with pytest.raises(TypeError, match=r"^trainer=group_trainer passes the function itself.*=group_trainer\(5\)$"):
        RTDETR(str(folder / "rtdetr-tiny.yaml")).train(**options_of(folder, "run"), trainer=group_trainer)
    assert contents(folder) == before


def test_what_cannot_be_resumed(folder):
    """It is refused before anything is written."""
    stop_after_first_epoch(folder, "run", group_trainer(K))
    weights = folder / "runs" / "run" / "weights"

    def refused(match, trainer=None):
        before = contents(folder / "runs")
        with pytest.raises(ValueError, match=match):
            RTDETR(weights / "last.pt").train(resume=True, workers=1, trainer=trainer or group_trainer(K))
        assert contents(folder / "runs") == before

    for trainer in (group_trainer(2), group_trainer(1), AcceleratedTrainer):
        refused(r"the training was started with 3 groups: pass group_trainer\(3\)", trainer)
    (kept,) = torch.load(weights / "groups_of_last.pt")
    torch.save([{**kept, "epoch": 7}], weights / "groups_of_last.pt")
    refused("has the groups of epoch 8, not of 1: resume from last.pt")
    torch.save([{**kept, "checkpoint": "another"}], weights / "groups_of_last.pt")
    refused(r"has the groups of another checkpoint than .*last.pt: both must be from the same training")
    (weights / "groups_of_last.pt").write_bytes(b"damaged")
    refused(r"groups_of_last.pt, with the groups of the training to resume, cannot be read: it is damaged")
    (weights / "groups_of_last.pt").unlink()
    refused(r"groups_of_last.pt, with the groups that .*last.pt leaves out, is missing")


def test_a_training_without_groups_resumes_beside_a_file_of_groups(folder):
    """Which an earlier training of that name has left."""
    stop_after_first_epoch(folder, "run", group_trainer(K))
    stop_after_first_epoch(folder, "run", AcceleratedTrainer, exist_ok=True, seed=7)
    detector = RTDETR(folder / "runs" / "run" / "weights" / "last.pt")
    detector.train(resume=True, trainer=AcceleratedTrainer)
    assert detector.trainer.start_epoch == 1


def test_a_training_that_has_ended_is_not_resumed(folder):
    train(folder, "run", trainer=group_trainer(K))
    last = folder / "runs" / "run" / "weights" / "last.pt"
    with pytest.raises(AssertionError, match="is finished, nothing to resume"):
        RTDETR(last).train(resume=str(last), trainer=group_trainer(K))


def test_losses_that_are_not_finite(folder):
    """Ultralytics goes back to last.pt then, and this to the groups of it."""
    poisoned, kept = [], []

    def poison(trainer):
        if trainer.epoch == 1 and not poisoned:
            poisoned.append({n: v.clone() for n, v in heads_of_others(trainer.ema.ema).state_dict().items()})
            with torch.no_grad():
                heads_of_others(trainer.model)[0]["enc_output"][0].weight.fill_(torch.nan)
        elif trainer.epoch == 1:
            kept.append({n: v.clone() for n, v in heads_of_others(trainer.model).state_dict().items()})

    detector = RTDETR(str(folder / "rtdetr-tiny.yaml"))
    detector.add_callback("on_train_epoch_start", poison)
    detector.train(**options_of(folder, "run"), epochs=2, trainer=group_trainer(K))
    assert len(kept) == 1
    torch.testing.assert_close(kept[0], poisoned[0])


@pytest.mark.parametrize("pretrained", [True, False])
def test_what_processes_of_ddp_start_from(folder, pretrained):
    """A pickle of the class, which is found by its name, and a model of one group, beside which groups begin anew."""
    overrides = {**options_of(folder, "run"), "model": str(folder / "rtdetr-tiny.yaml"), "epochs": 1}
    trainer = group_trainer(K)(overrides={**overrides, "pretrained": pretrained})
    weights = model_of() if pretrained else None
    trainer.model = trainer.get_model(cfg=str(folder / "rtdetr-tiny.yaml"), weights=weights, verbose=False)
    script = generate_ddp_file(trainer)
    try:
        state = torch_load(script.replace(".py", ".pt"), map_location="cpu")
    finally:
        ddp_cleanup(trainer, script)
    assert state["trainer"] is group_trainer(K)
    assert type(state["model"]) is RTDETRDetectionModel
    again = state["trainer"](overrides=state["args"])
    again.model = state["model"]
    again.setup_model()
    for model in (trainer.model, again.model):
        own, others = model.model[-1].enc_output[0].weight, heads_of_others(model)
        assert len(others) == K - 1
        for heads in others:
            difference = (heads["enc_output"][0].weight - own).std() / own.std()
            assert (0.05 < difference < 0.2) if pretrained else difference > 1


@pytest.mark.parametrize(("option", "value"), [("compile", True), ("distill_model", "rtdetr-x.pt"), ("quantize", 8)])
def test_what_was_not_tried_is_refused(folder, option, value):
    """Before anything is written."""
    train(folder, "run", trainer=AcceleratedTrainer)
    before = contents(folder / "runs")
    overrides = {**options_of(folder, "run"), "model": str(folder / "rtdetr-tiny.yaml"), "exist_ok": True}
    with pytest.raises(ValueError, match=f"{option} was not tried with groups of queries: leave one of them out"):
        group_trainer(K)(overrides={**overrides, option: value})
    assert contents(folder / "runs") == before


@pytest.mark.parametrize("version", ["8.4.0", "8.4.189", "8.5.0"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(parts, "__version__", version)
    with pytest.raises(ValueError, match=f"not tested with ultralytics {version}: use ultralytics>=8.4.190,<8.5"):
        group_trainer(K)


def test_subclasses_are_refused():
    model = model_of()
    model.model[-1].__class__ = type("OtherHead", (RTDETRDecoder,), {})
    with pytest.raises(TypeError, match="groups need a RTDETRDecoder itself, got a OtherHead"):
        add_groups(model, 2)
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        add_groups(model_of(), 0)
