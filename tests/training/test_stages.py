"""A stage accepts what is right, refuses what is wrong in words, and is changed by text of the right type."""

import dataclasses

import pytest

from nanovlm.training.stages import PARTS, Stage, choose, override

STAGE = Stage("align", "language", {"bridge": 1e-3}, {"scenes": 1.0}, steps=10, batch_size=8)


def changed(**values):
    return dataclasses.replace(STAGE, **values)


@pytest.mark.parametrize("values", [
    {"steps": 1}, {"micro_batch_size": 8}, {"max_tokens": 2}, {"layer_decay": {"bridge": 1.0}}, {"momentum": 0.0},
    {"betas": (0.0, 0.999)}, {"clip": None}, {"clip": 1e-9}, {"warmup_steps": 9}, {"end_lr_factor": 1.0},
    {"learning_rates": {part: 1.0 for part in PARTS if part != "text_tower"}}, {"precision": "bfloat16"},
    {"objective": "contrastive", "learning_rates": {"vision": 1.0, "text_tower": 1.0}, "micro_batch_size": 8},
])
def test_limits_are_allowed(values):
    for name, value in values.items():
        assert vars(changed(**values))[name] == value


@pytest.mark.parametrize(("values", "words"), [
    ({"objective": "contrastve"}, "unknown objective 'contrastve'. Did you mean 'contrastive'"),
    ({"image_fit": "corp"}, "Did you mean 'crop'"),
    ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ({"optimizer": "adam"}, "Did you mean 'adamw'"),
    ({"non_finite": "stpo"}, "Did you mean 'stop'"), ({"precision": "bfloat"}, "Did you mean 'bfloat16'"),
    ({"learning_rates": {"brigde": 1.0}}, "learning_rates names an unknown part 'brigde'. Did you mean 'bridge'"),
    ({"layer_decay": {"visoin": 0.5}}, "layer_decay names an unknown part 'visoin'. Did you mean 'vision'"),
    ({"learning_rates": {"text_tower": 1.0}}, "language loss does not reach 'text_tower'"),
    ({"objective": "contrastive"}, "contrastive loss does not reach 'bridge'"),
    ({"name": ""}, "not empty"), ({"name": "a.b"}, "no '.'"), ({"name": "a=b"}, "no '='"),
    ({"steps": 0}, "steps is 0"), ({"micro_batch_size": 0}, "micro_batch_size is 0"),
    ({"micro_batch_size": 9}, "micro_batch_size is 9"), ({"max_tokens": 1}, "max_tokens is 1"),
    ({"objective": "contrastive", "learning_rates": {"vision": 1.0}, "micro_batch_size": 4}, "compares the whole batch"),
    ({"learning_rates": {}}, "nothing would train"), ({"learning_rates": {"bridge": float("inf")}}, "learning_rates is"),
    ({"mixture": {}}, "no data source"), ({"mixture": {"scenes": 0.0}}, "mixture is"),
    ({"layer_decay": {"bridge": 1.01}}, "layer_decay"), ({"momentum": 1.0}, "momentum is 1.0"),
    ({"momentum": -0.1}, "momentum is -0.1"), ({"betas": (0.9, 1.0)}, "betas"), ({"decay_share": 0.0}, "decay_share is 0.0"),
    ({"decay_share": 1.1}, "decay_share is 1.1"), ({"warmup_steps": 10}, "warmup_steps is 10"),
])
def test_mistakes_are_named(values, words):
    with pytest.raises(ValueError) as error:
        changed(**values)
    assert words in str(error.value)
    assert values.get("name", "stage 'align'") in str(error.value)


@pytest.mark.parametrize(("field", "text", "value"), [
    ("steps", "100", 100), ("weight_decay", "1e-2", 0.01), ("schedule", "cosine", "cosine"),
    ("betas", "0.9,0.98", (0.9, 0.98)),
    ("copy_vision_branch", "True", True), ("copy_vision_branch", "false", False), ("micro_batch_size", "4", 4),
    ("micro_batch_size", "None", None), ("clip", "none", None), ("clip", "0.5", 0.5),
])
def test_override_takes_the_type_of_the_field(field, text, value):
    result = vars(override(changed(micro_batch_size=2), {field: text}))[field]
    assert result == value and type(result) is type(value)


def test_override_checks_the_stage_when_all_changes_are_in():
    late = changed(warmup_steps=5)
    assert override(late, {"steps": "1", "warmup_steps": "0"}).steps == 1
    with pytest.warns(UserWarning, match="align.warmup_steps is now 2"):
        assert override(late, {"steps": "4"}).warmup_steps == 2
    with pytest.raises(ValueError, match="warmup_steps is 7"):
        override(late, {"steps": "4", "warmup_steps": "7"})
    assert override(late, {}) == late
    assert override(late, {"mixture.a": "2", "mixture.scenes": "none"}).mixture == {"a": 2.0}
    both = override(STAGE, {"learning_rates.vision": "2e-4"})
    assert both.learning_rates == {"bridge": 1e-3, "vision": 2e-4}
    assert STAGE.learning_rates == {"bridge": 1e-3}
    assert override(both, {"learning_rates.bridge": "none"}).learning_rates == {"vision": 2e-4}
    assert override(STAGE, {"mixture.scenes": "3"}).mixture == {"scenes": 3.0}


def test_what_is_tuned_has_a_name():
    """Bridge, bridge and language model, low rank, all: what papers graft into the language model keeps training."""
    lynx = changed(learning_rates={"bridge": 2e-5, "adapters": 1e-5})
    words = {"embedding": 2e-5, "language_model": 2e-5, "lm_head": 2e-5}
    for choice, rates in (("bridge", {}), ("bridge_lm", words), ("lora", {"lora": 2e-5}), ("all", words | {"vision": 2e-5})):
        assert override(lynx, {"tune": choice}).learning_rates == rates | {"bridge": 2e-5, "adapters": 1e-5}
    assert override(STAGE, {"tune": "bridge"}) == STAGE
    assert override(STAGE, {"tune": "lora", "learning_rates.lora": "1e-4"}).learning_rates == {"bridge": 1e-3, "lora": 1e-4}
    with pytest.raises(ValueError, match="unknown align.tune 'al'. Did you mean 'all'"):
        override(STAGE, {"tune": "al"})


@pytest.mark.parametrize(("field", "text", "words"), [
    ("stepps", "1", "no field 'stepps'. Did you mean 'steps'"), ("steps", "1.5", "align.steps=1.5: int expected"),
    ("steps", "0", "steps is 0"), ("clip", "x", "align.clip=x: float expected"),
    ("betas", "0.9", "align.betas=0.9: float, float expected"), ("copy_vision_branch", "1", "bool expected"),
    ("steps.x", "1", "align.steps.x=1: steps is one value"), ("mixture", "x", "align.mixture=x: mixture is a table"),
    ("learning_rates.brigde", "1", "Did you mean 'bridge'"),
    ("mixture.other", "none", "align.mixture.other: there is no entry 'other' to remove. Known: 'scenes'"),
])
def test_override_explains_mistakes(field, text, words):
    with pytest.raises(ValueError) as error:
        override(STAGE, {field: text})
    assert words in str(error.value)


STAGES = tuple(changed(name=name) for name in ("tower", "align", "instruct"))


def names(stages):
    return [stage.name for stage in stages]


def test_choose_keeps_the_recipes_order():
    assert choose(STAGES) == STAGES
    assert names(choose(STAGES, ["instruct", "tower"])) == ["tower", "instruct"]
    assert names(choose(STAGES, without=["align"])) == ["tower", "instruct"]
    assert names(choose(STAGES, ["instruct", "tower"], ["tower"])) == ["instruct"]
    chosen = choose(STAGES, settings=["align.steps=3", "align.steps=4", "tower.mixture.a=2"])
    assert [stage.steps for stage in chosen] == [10, 4, 10]
    assert chosen[0].mixture == {"scenes": 1.0, "a": 2.0}


@pytest.mark.parametrize(("arguments", "words"), [
    ((["allign"],), "no stage 'allign'. Did you mean 'align'"), ((None, ["towr"]), "Did you mean 'tower'"),
    ((["align"], ["align"]), "no stage is left to run of: tower, align, instruct"),
    ((None, (), ["align.steps"]), "expected stage.field=value"), ((None, (), ["steps=3"]),
    "for example tower.steps=100"),
    ((["tower"], (), ["align.steps=3"]), "no such stage runs: 'align'. Known: 'tower'"),
])
def test_choose_explains_mistakes(arguments, words):
    with pytest.raises(ValueError) as error:
        choose(STAGES, *arguments)
    assert words in str(error.value)
