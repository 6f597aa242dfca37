"""A plan's PEFT configuration: what `adapt` uses, for other trainers, with dropout and rsLoRA's scale."""

import math

import datasets
import pytest
import torch
import trl
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import make_model

import aletheia
from aletheia.adapters.adapt import adapted_modules, check_adapters
from aletheia.adapters.correction import Correction, rows_to_measure
from aletheia.data.examples import Example
from aletheia.errors import AdapterError, PlanError


@pytest.fixture(scope="module")
def scores(examples):
    return {family: aletheia.probe(make_model(family), examples, batches=1) for family in ("llama", "mixtral")}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_is_what_adapt_uses(scores, family):
    plan = aletheia.plan(scores[family], policy="last", rank=4, ranks="by-role", mlp_rank=8)
    model = make_model(family)
    before = {name: id(module) for name, module in model.named_modules()}
    config = plan.lora_config(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    by_hand, ours = get_peft_model(model, config), aletheia.adapt(make_model(family), plan)
    check_adapters(by_hand, plan)
    assert adapted_modules(by_hand) == adapted_modules(ours)
    assert by_hand.peft_config["default"].to_dict() == ours.peft_config["default"].to_dict() | {
        "base_model_name_or_path": by_hand.peft_config["default"].base_model_name_or_path
    }


def test_trl_trains_the_planned_modules(scores, tokenizer, tmp_path):
    plan = aletheia.plan(scores["llama"], policy="last", rank=4, target_modules="q_proj,v_proj")
    model = make_model("llama")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list([{"text": "say red"}] * 8),
        processing_class=tokenizer,
        peft_config=plan.lora_config(model),
    )
    trainer.train()
    assert adapted_modules(trainer.model) == {adapter.name: (4, 8.0) for adapter in plan.adapters}
    assert all(name.endswith(("q_proj", "v_proj")) for name in adapted_modules(trainer.model))
    assert any(value.any() for name, value in trainer.model.named_parameters() if "lora_B" in name)


def test_dropout_and_rslora_reach_every_adapter(scores):
    plan = aletheia.plan(
        scores["llama"], policy="last", attention_rank=4, mlp_rank=16, alpha=6, dropout=0.2, rslora=True
    )
    adapted = aletheia.adapt(make_model("llama"), plan)
    found = layers_of(adapted)
    assert {module.r["default"] for module in found} == {4, 16}
    for module in found:
        assert module.scaling["default"] == pytest.approx(6 / math.sqrt(module.r["default"]))
        assert module.lora_dropout["default"].p == 0.2
    plain = layers_of(aletheia.adapt(make_model("llama"), aletheia.plan(scores["llama"], policy="last")))
    assert {module.scaling["default"] for module in plain} == {2.0}
    assert all(isinstance(module.lora_dropout["default"], torch.nn.Identity) for module in plain)


def test_experts_have_no_dropout(scores):
    with pytest.raises(PlanError, match=r"`dropout` is 0.1.*experts.*without down_proj, gate_up_proj") as caught:
        aletheia.plan(scores["mixtral"], dropout=0.1)
    assert "\n" not in str(caught.value)
    attention = aletheia.plan(scores["mixtral"], dropout=0.1, target_modules=("q_proj", "o_proj"))
    assert len(layers_of(aletheia.adapt(make_model("mixtral"), attention))) == len(attention.adapters)
    edited = aletheia.plan(scores["mixtral"])
    edited = edited.model_copy(update={"settings": edited.settings.model_copy(update={"dropout": 0.1})})
    model = make_model("mixtral")
    with pytest.raises(PlanError, match=r"`dropout` is 0\.1"):
        aletheia.adapt(model, edited)
    assert not layers_of(model)


def test_a_foreign_plan_or_an_unknown_name_is_refused(scores):
    plan = aletheia.plan(scores["llama"])
    with pytest.raises(PlanError, match="make a plan for this model"):
        plan.lora_config(make_model("mixtral"))
    with pytest.raises(PlanError, match=r"`target_modules` names query, .*expected some of down_proj, .*v_proj"):
        aletheia.plan(scores["llama"], target_modules="query")


@pytest.mark.parametrize(("lengths", "taken"), [([100] * 20, 8), ([3000, 100, 100], 1), ([9000, 5], 1), ([500] * 9, 8)])
def test_the_rows_of_a_correction_fit_into_one_padded_batch(lengths, taken):
    rows = [Example([1] * length, [1] * length, "") for length in lengths]
    assert rows_to_measure(rows) == rows[:taken]


def test_the_correction_refuses_rslora(scores):
    adapted = aletheia.adapt(make_model("llama"), aletheia.plan(scores["llama"], rslora=True))
    with (
        Correction() as correction,
        pytest.raises(AdapterError, match="`correct_quantization` and `rslora` are both on"),
    ):
        correction.measure(adapted, [], {})
