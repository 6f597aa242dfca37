"""What is not finite is named by step, layer and module, never applied and never saved."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model

from aletheia.adapters.adapt import adapt
from aletheia.errors import ProbeError, TrainingError
from aletheia.planning.make import plan as make_plan
from aletheia.probing.resident import probe
from aletheia.training import loop
from aletheia.training.train import train

STEP, STEPS = 4, 6  # where a value is spoiled, of how many
WAYS = {
    "plain": {"cache": "off"},
    "cached": {"cache": "memory"},
    "accumulated": {"gradient_accumulation_steps": 3, "batch_size": 1, "cache": "off"},
    "recomputed": {"gradient_checkpointing": "full", "cache": "off"},
    "bfloat16": {"cache": "off"},
    "without waiting": {"cache": "memory"},  # as on a GPU, where each step is looked at in the next one
    "without waiting, saved seldom": {"cache": "memory", "save_steps": STEP - 1},
}
LAYER, MODULE = 2, "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def scores(examples):
    return probe(make_model("llama"), examples, seed=0)


class Spoiler:
    """Counts steps of the adapted model and spoils one value at ``STEP``."""

    def __init__(self, model, place, value, passes_per_step):
        self.model, self.value, self.passes = model, value, 0
        self.at = (STEP - 1) * passes_per_step + 1  # the first pass of that step
        self.module = model.get_submodule(f"base_model.model.{MODULE}")
        model.register_forward_pre_hook(self.count, with_kwargs=True)
        if place == "output":
            self.module.register_forward_hook(lambda module, args, output: output * self.factor)
        elif place == "gradient":
            self.module.lora_B["default"].weight.register_hook(lambda gradient: gradient * self.factor)
        else:
            self.weight = self.module.lora_A["default"] if place == "adapter" else self.module.base_layer

    @property
    def factor(self):
        return self.value if self.passes >= self.at else 1.0

    def count(self, module, args, kwargs):
        self.passes += self.model.training and torch.is_grad_enabled()
        if self.passes == self.at and hasattr(self, "weight"):
            with torch.no_grad():
                self.weight.weight[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["output", "gradient", "adapter", "base"])
def test_what_is_not_finite_is_named_and_neither_applied_nor_saved(
    examples, scores, tmp_path, monkeypatch, place, way, value
):
    if "without waiting" in way:
        monkeypatch.setattr(loop, "is_behind", lambda device: True)
    model = make_model("llama")
    if way == "bfloat16":
        model = model.to(torch.bfloat16)
    plan = make_plan(scores, policy="last", freeze_after=0)
    adapted = adapt(model, plan)
    Spoiler(adapted, place, value, passes_per_step=WAYS[way].get("gradient_accumulation_steps", 1))
    data, held_out = examples.subset(range(12)), examples.subset(range(20, 25))
    with pytest.raises(TrainingError) as raised:
        train(
            adapted, data, plan, tmp_path / "run", held_out, steps=STEPS, evaluations=1, show_progress=False,
            **{"save_steps": 1} | WAYS[way],
        )  # fmt: skip
    told = str(raised.value)
    assert f"layer {LAYER} ({MODULE}" in told, told
    assert f"at step {STEP}," in told, told
    assert "not saved" in told
    kept = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert kept[-1].name == f"checkpoint-{STEP - 1}"
    saved = load_file(kept[-1] / "adapter_model.safetensors")
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and MODULE not in name:  # the one that was spoiled is
            assert torch.equal(weight, saved[name.replace(".default", "")]), name


def test_a_step_that_breaks_the_weights_is_not_saved(examples, scores, tmp_path):
    plan = make_plan(scores, policy="last", freeze_after=0)
    adapted = adapt(make_model("llama"), plan)
    data, held_out = examples.subset(range(12)), examples.subset(range(20, 25))
    with pytest.raises(TrainingError, match=r"the weight of layer \d \(model\.layers.* is not finite, at step 1"):
        train(
            adapted, data, plan, tmp_path / "run", held_out, steps=9, warmup_steps=0, learning_rate=1e300,
            weight_decay=1e300, save_steps=1, show_progress=False,
        )  # fmt: skip
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("place", ["output", "base"])
def test_the_resident_probe_names_the_module(examples, place):
    model = copy.deepcopy(make_model("llama"))
    module = model.get_submodule(MODULE)
    if place == "output":
        module.register_forward_hook(lambda module, args, output: output * math.nan)
    else:
        module.weight.data[0, 0] = math.inf
    with pytest.raises(ProbeError, match=rf"the output of layer {LAYER} \({MODULE}\) is not finite in probe batch 1"):
        probe(model, examples)
