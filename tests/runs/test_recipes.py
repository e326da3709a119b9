"""The paper's runs: each can be built as it stands, and is what its row says."""

import re
from dataclasses import asdict

import pytest

from groupdetr_fast.models.registry import model_config, model_names
from groupdetr_fast.runs.recipes import RECIPES, find_recipe
from groupdetr_fast.training.config import SCHEDULES


def queries_of(model):
    return {"dino_4scale_r50": 900, "mask2former_r50": 100}.get(model, 300)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_of_its_own_name(name):
    recipe = find_recipe(name)
    group, model, epochs, groups = re.fullmatch(r"(group_)?(\w+?)_(\d+)e(?:_k(\d+))?", name).groups()
    assert (recipe.name, recipe.model, recipe.epochs) == (name, model, int(epochs))
    assert recipe.model in model_names()
    assert recipe.num_groups == (int(groups or 11) if group else 1)
    assert recipe.num_queries == model_config(model).num_queries == queries_of(model)

    config = recipe.config(processes=8)
    assert config.optimization.resolved().epochs == recipe.epochs
    assert config.optimization.batch_size * config.optimization.accumulate * 8 == recipe.images_per_step
    assert (config.model.model, config.model.num_groups) == (recipe.model, recipe.num_groups)
    assert config.data.labels == ("contiguous" if "mask" in model else "category_id")
    assert config.model.backbone_weights == "imagenet"
    assert str(config.output) == f"runs/{name}"


def test_groups_gain_as_the_paper_says():
    """The gains of tables 3, 4 and 6, which the paper prints beside the numbers."""
    gains = {}
    for name, recipe in RECIPES.items():
        if recipe.num_groups == 11:
            gains[name.removeprefix("group_")] = round(recipe.ap - recipe.baseline_ap, 1)
    assert gains == {
        "conditional_detr_r50_12e": 5.0,
        "conditional_detr_r50_50e": 2.5,
        "conditional_detr_r50_dc5_12e": 4.8,
        "conditional_detr_r50_dc5_50e": 2.1,
        "dab_detr_r50_12e": 3.9,
        "dab_detr_r50_50e": 2.3,
        "dab_detr_r50_dc5_12e": 4.4,
        "dab_detr_r50_dc5_50e": 2.2,
        "dn_detr_r50_12e": 2.0,
        "dn_detr_r50_50e": 1.4,
        "dn_detr_r50_dc5_12e": 2.6,
        "dn_detr_r50_dc5_50e": 0.5,
        "dab_deformable_detr_r50_12e": 1.5,
        "dab_deformable_detr_r50_50e": 1.6,
        "dino_4scale_r50_12e": 0.7,
        "dino_4scale_r50_36e": 0.4,
        "mask2former_r50_12e": 1.2,
        "mask2former_r50_50e": 0.3,
    }
    for recipe in RECIPES.values():
        if recipe.num_groups > 1:
            name = re.sub(r"_k\d+\Z", "", recipe.name.removeprefix("group_"))
            assert RECIPES[name].ap == recipe.baseline_ap


def test_schedules_and_rates_are_the_papers():
    drops = {(recipe.epochs, recipe.lr_drop) for recipe in RECIPES.values() if "mask" not in recipe.model}
    assert drops == {*SCHEDULES.values(), (36, (30,))}
    optimization = find_recipe("group_dab_detr_r50_50e").config().optimization
    assert (optimization.lr, optimization.backbone_lr, optimization.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (optimization.decay, optimization.clip_norm) == ("step", 0.1)


def test_mask2former_is_trained_as_in_its_repository():
    recipe = find_recipe("group_mask2former_r50_50e")
    # drops after 327778 and 355092 of 368750 steps of 16 images
    assert recipe.lr_drop == pytest.approx((50 * 327778 / 368750, 50 * 355092 / 368750), abs=0.06)
    config = recipe.config()
    optimization = config.optimization
    assert (optimization.weight_decay, optimization.decay_norms, optimization.clip_norm) == (0.05, False, 0.01)
    assert (config.augmentation.jitter_size, config.augmentation.jitter_scale) == (1024, (0.1, 2.0))


@pytest.mark.parametrize(
    ("name", "processes", "batch_size", "accumulate"),
    [
        ("group_dab_detr_r50_12e", 1, 2, 8),
        ("group_dab_detr_r50_12e", 4, 2, 2),
        ("group_dab_detr_r50_12e", 16, 1, 1),
        ("group_conditional_detr_r50_dc5_12e", 8, 1, 1),
    ],
)
def test_any_number_of_processes_sees_the_same_images_per_step(name, processes, batch_size, accumulate):
    optimization = find_recipe(name).config(processes).optimization
    assert (optimization.batch_size, optimization.accumulate) == (batch_size, accumulate)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="steps of 16 images, which 3 processes cannot share evenly"):
        find_recipe("dn_detr_r50_12e").config(processes=3)
    with pytest.raises(ValueError, match="unknown recipe 'dn_detr'; groupdetr recipes lists them"):
        find_recipe("dn_detr")


def test_the_baseline_differs_in_its_groups_alone():
    first, second = (find_recipe(name).config() for name in ("dab_detr_r50_12e", "group_dab_detr_r50_12e"))
    first, second = asdict(first), asdict(second)
    assert (first["model"].pop("num_groups"), second["model"].pop("num_groups")) == (1, 11)
    assert first.pop("output") != second.pop("output")
    assert first == second
