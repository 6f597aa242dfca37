"""Adapters as planned, nothing below the boundary, the training loop and the folder it leaves."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import FAMILIES, make_model

from aletheia.adapters.adapt import adapt, adapted_modules, check_adapters
from aletheia.anatomy.read import find_layers
from aletheia.errors import AdapterError, ArtifactError, PlanError, SettingsError, TrainingError
from aletheia.planning.make import plan as make_plan
from aletheia.planning.plan import Plan
from aletheia.prefix.boundary import lowest_trainable_layer
from aletheia.probing.resident import probe
from aletheia.reporting.comparison import differences
from aletheia.runs.folder import RunFolder
from aletheia.runs.schema import Run
from aletheia.training import loop
from aletheia.training import train as train_module
from aletheia.training.held_out import held_out_loss
from aletheia.training.loop import evaluations_of
from aletheia.training.recorder import due_steps
from aletheia.training.settings import NOT_TAKEN, TrainSettings
from aletheia.training.train import default_learning_rate, train

POLICIES = ("depth-aware", "top-percent", "last", "first", "random", "bottom", "uniform")
RANK_MODES = ("uniform", "by-role", "by-score")


@pytest.fixture(scope="module")
def scores(examples):
    return {family: probe(make_model(family), examples, batches=2) for family in FAMILIES}


def trained(examples, scores, out, model=None, **settings):
    """Train a tiny Llama as planned by ``last``."""
    model = model or make_model("llama")
    plan = make_plan(scores["llama"], policy="last")
    adapted = adapt(model, plan)
    settings = {"steps": 12, "learning_rate": 1e-2, "show_progress": False} | settings
    data, held_out = examples.subset(range(40)), examples.subset(range(40, 60))
    return adapted, train(adapted, data, plan, out, held_out, **settings)


# --- adapters


@pytest.mark.parametrize(
    ("family", "policy", "ranks"),
    [  # every policy with every kind of ranks, and the modules of every family with every kind of ranks
        *(("llama", policy, ranks) for policy in POLICIES for ranks in RANK_MODES),
        *((family, "top-percent", ranks) for family in FAMILIES if family != "llama" for ranks in RANK_MODES),
    ],
)
def test_the_adapted_set_is_the_plan(scores, family, policy, ranks):
    plan = make_plan(scores[family], policy=policy, ranks=ranks, percent=50, rank=8)
    adapted = adapt(make_model(family), plan)
    assert adapted_modules(adapted) == {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters}
    assert lowest_trainable_layer(adapted) == min(*plan.layers, *plan.early_layers, plan.boundary)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(plan.adapters)
    assert all("lora_" in name for name in trainable)


def test_layer_1_is_not_layer_11(examples):
    """PEFT matches suffixes and patterns; names in full must not touch their longer neighbours."""
    model = make_model("llama", layers=12)
    found = probe(model, examples, batches=1)
    plan = make_plan(found, policy="first", percent=17, ranks="by-score")
    assert plan.layers == (0, 1)
    adapt(model, plan)
    assert {int(name.split(".")[2]) for name in adapted_modules(model)} == {0, 1}


def test_a_plan_for_another_model_is_refused(scores):
    plan = make_plan(scores["llama"])
    with pytest.raises(PlanError, match=r"made for LlamaForCausalLM .* this model is Qwen2ForCausalLM"):
        adapt(make_model("qwen2"), plan)
    with pytest.raises(PlanError, match="make a plan for this model"):
        adapt(make_model("llama", seed=1), plan)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "model.layers.2.mlp"}, r"adapts model\.layers\.2\.mlp, but the model has no such module"),
        ({"layer": 3}, "in layer 3 .* expected layer 2"),
        ({"rank": 8}, "at rank 8, 512"),
    ],
)
def test_an_edited_plan_that_does_not_fit_is_refused_before_anything_changes(scores, change, expected):
    plan = make_plan(scores["llama"], policy="last")
    edited = plan.model_copy(update={"adapters": (plan.adapters[0].model_copy(update=change), *plan.adapters[1:])})
    model = make_model("llama")
    with pytest.raises(PlanError, match=expected):
        adapt(model, edited)
    assert adapted_modules(model) == {}


def test_a_difference_from_the_plan_is_an_error(scores):
    plan = make_plan(scores["llama"], policy="last")
    adapted = adapt(make_model("llama"), plan)
    fewer = plan.model_copy(update={"adapters": plan.adapters[1:]})
    with pytest.raises(AdapterError, match=rf"1 module\(s\) differ.*{plan.adapters[0].name}.*expected.*nothing"):
        check_adapters(adapted, fewer)
    other_rank = plan.adapters[0].model_copy(update={"rank": 3})
    with pytest.raises(AdapterError, match=r"expected \(rank, alpha\) \(3, 32.0\), found \(16, 32.0\)"):
        check_adapters(adapted, plan.model_copy(update={"adapters": (other_rank, *plan.adapters[1:])}))
    adapted.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="expected everything except the adapters to be frozen"):
        check_adapters(adapted, plan)
    with pytest.raises(AdapterError, match="has LoRA adapters already"):
        adapt(adapted, plan)


def test_adapters_start_the_same_for_a_seed_and_leave_the_global_state_alone(scores):
    plan = make_plan(scores["llama"], policy="last")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (adapt(make_model("llama"), plan, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    key = next(name for name, _ in first.named_parameters() if "lora_A" in name)
    a, b, c = (dict(model.named_parameters())[key] for model in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- training


def test_training_learns_and_leaves_a_complete_folder(examples, scores, tmp_path):
    model, run = trained(examples, scores, tmp_path / "run")
    metrics = run.metrics
    assert metrics.model == run.plan.model
    assert metrics.held_out_loss_after < metrics.held_out_loss_before - 0.1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {".lock"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "plan.json",
        "metrics.json",
        "manifest.json",
    }
    assert Run.read(tmp_path / "run") == run
    assert metrics.steps == 12
    assert [point.step for point in metrics.train_curve] == list(range(1, 13))
    assert [point.step for point in metrics.held_out_curve] == [0, 2, 5, 7, 10, 12]  # four times a pass
    assert metrics.boundary == 2
    assert metrics.trainable_parameters == run.plan.trainable_parameters
    assert metrics.peak_memory_bytes > 100_000_000  # torch alone takes more
    assert 0 < metrics.train_curve[-1].train_seconds <= metrics.seconds.train
    assert metrics.held_out_rows == 20
    # the figure is the mean over tokens of the model as it is now
    held_out = examples.subset(range(40, 60))
    assert held_out_loss(model, held_out) == pytest.approx(metrics.held_out_loss_after, rel=1e-6)


def test_the_folder_is_a_standard_adapter(examples, scores, tmp_path):
    model, _ = trained(examples, scores, tmp_path / "run")
    batch = torch.randint(0, 256, (2, 9))
    expected = model.eval()(batch).logits
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "run")
    torch.testing.assert_close(loaded(batch).logits, expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.generate(batch, max_new_tokens=3, do_sample=False).shape[1] > 9
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "LoRA on 2 of 4 layers" in card
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_the_held_out_loss_is_the_mean_over_completion_tokens(examples):
    model = make_model("llama")
    summed = tokens = 0.0
    for example in examples.examples:
        logits_TV = model(torch.tensor([example.input_ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(example.labels[1:]), reduction="sum")
        summed += losses.item()
        tokens += sum(label != -100 for label in example.labels[1:])
    model.train()
    assert held_out_loss(model, examples, batch_size=7) == pytest.approx(summed / tokens, rel=1e-5)
    assert model.training


def test_evaluation_leaves_every_module_in_its_mode(examples, scores):
    model = adapt(make_model("llama").eval(), make_plan(scores["llama"], policy="last"))
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}  # the wrapper is new, what it wraps is not
    held_out_loss(model, examples.subset(range(4)))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_nothing_below_the_boundary(examples, scores, tmp_path, monkeypatch):
    """No graph, no backward pass, no gradient and no optimizer state below the lowest adapted layer."""
    trainers, graphs, backward = [], {}, set()

    class Spy(train_module.RowTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(train_module, "RowTrainer", Spy)
    model = make_model("llama")

    def watch(index):
        def hook(module, args, output):
            if module.training:
                graphs.setdefault(index, set()).add(output.requires_grad)
                if output.requires_grad:
                    output.register_hook(lambda gradient: backward.add(index))

        return hook

    _, layers = find_layers(model)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(watch(index))
    adapted, run = trained(examples, scores, tmp_path / "run", model, steps=3, cache="off")
    assert graphs == {0: {False}, 1: {False}, 2: {True}, 3: {True}}
    assert backward == {2, 3}
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    held = [names[id(parameter)] for parameter in trainers[0].optimizer.state]
    assert len(held) == 2 * len(run.plan.adapters)
    assert all(".layers.2." in name or ".layers.3." in name for name in held)
    below = [p for name, p in adapted.named_parameters() if ".layers.0." in name or ".layers.1." in name]
    assert all(parameter.grad is None for parameter in below)


def test_tokens_are_counted_without_padding(examples, scores, tmp_path):
    _, run = trained(examples, scores, tmp_path / "run", steps=None, epochs=1, batch_size=8)
    data = examples.subset(range(40))
    assert run.metrics.steps == 5
    assert run.metrics.tokens == data.tokens
    assert run.metrics.labelled_tokens == data.labelled_tokens


def test_a_seed_repeats_a_run(examples, scores, tmp_path):
    _, first = trained(examples, scores, tmp_path / "a", seed=3)
    _, again = trained(examples, scores, tmp_path / "b", seed=3)
    _, other = trained(examples, scores, tmp_path / "c", seed=4)
    losses = [[point.loss for point in run.metrics.train_curve] for run in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


def test_another_run_is_never_overwritten_unasked(examples, scores, tmp_path):
    trained(examples, scores, tmp_path / "run", steps=1)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(ArtifactError, match="run; choose another `out`, or replace it with `overwrite`"):
        trained(examples, scores, tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    with RunFolder.claim(tmp_path / "run", overwrite=True) as claimed:
        trained(examples, scores, claimed, steps=2)
    assert Run.read(tmp_path / "run").metrics.steps == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="holds other files"):
            RunFolder.claim(tmp_path / "full", overwrite)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(ArtifactError, match="is a file; expected a folder"):
        trained(examples, scores, tmp_path / "full" / "thesis.txt")


def test_a_place_that_cannot_be_written_is_refused_before_training(examples, scores):
    with pytest.raises(ArtifactError, match="cannot write /proc/aletheia/run"):
        trained(examples, scores, Path("/proc/aletheia/run"))


def test_a_run_that_cannot_be_saved_leaves_the_one_it_would_replace(examples, scores, tmp_path, monkeypatch):
    trained(examples, scores, tmp_path / "run", steps=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    write = peft_model.safe_save_file

    def full(state, file, **options):
        if "checkpoints" not in str(file):
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        write(state, file, **options)

    monkeypatch.setattr(peft_model, "safe_save_file", full)
    claimed = RunFolder.claim(tmp_path / "run", overwrite=True)
    with (
        claimed,
        pytest.raises(ArtifactError, match=r"No space left on device: [\d,]+ bytes are needed, [\d,]+ bytes are free"),
    ):
        trained(examples, scores, claimed, steps=2)
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr("aletheia.runs.folder.free_bytes", lambda folder: 100)
    with pytest.raises(ArtifactError, match="the adapter needs"):
        trained(examples, scores, tmp_path / "other", steps=1)
    assert not (tmp_path / "other").exists()


def test_arms_see_the_same_batches_and_can_be_compared(examples, scores, tmp_path):
    runs = []
    for policy in ("uniform", "last"):
        plan = make_plan(scores["llama"], policy=policy)
        model = adapt(make_model("llama"), plan)
        data, held_out = examples.subset(range(40)), examples.subset(range(40, 60))
        out = tmp_path / policy
        runs.append(train(model, data, plan, out, held_out, steps=3, show_progress=False))
    assert runs[0].metrics.train_curve[0].loss == pytest.approx(runs[1].metrics.train_curve[0].loss, rel=1e-6)
    assert runs[0].metrics.labelled_tokens == runs[1].metrics.labelled_tokens
    assert differences(runs) == ()


def test_a_plan_that_looked_at_scores_owes_its_probe(examples, scores, tmp_path):
    _, run = trained(examples, scores, tmp_path / "last", steps=1)
    assert run.metrics.seconds.probe == 0.0
    plan = make_plan(scores["llama"], policy="top-percent")
    data, held_out = examples.subset(range(40)), examples.subset(range(40, 60))
    model = adapt(make_model("llama"), plan)
    run = train(model, data, plan, tmp_path / "top", held_out, steps=1, show_progress=False)
    assert run.metrics.seconds.probe == plan.probe.seconds > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(examples, scores, tmp_path):
    with pytest.raises(TrainingError, match=r"is not finite|is nan|is inf"):
        trained(examples, scores, tmp_path / "run", learning_rate=1e30)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 0}, "`steps` is 0; expected at least 1"),
        ({"batch_size": 0}, "`batch_size` is 0; expected at least 1"),
        ({"steps": None, "epochs": 0.0}, "`epochs` is 0; expected more than 0"),
        ({"epochs": 1}, "`steps` and `epochs` are both given; expected one of them"),
        ({"learning_rate": -1.0}, "`learning_rate` is -1; expected more than 0"),
        ({"evaluations": 0}, "`evaluations` is 0; expected at least 1"),
        (
            {"early_stop": False, "early_stopping_patience": 2},
            "`early_stopping_patience` is given and `early_stop` is false; expected `early_stop` true with it",
        ),
        ({"learning_rate": math.nan}, "`learning_rate` is nan; expected"),
        ({"keep": "worst"}, "`keep` is 'worst'; expected one of best, last"),
        ({"stepz": 3}, "unknown setting `stepz`"),
    ],
)
def test_training_settings_out_of_range_are_refused(examples, scores, tmp_path, settings, expected):
    with pytest.raises(SettingsError, match=expected):
        trained(examples, scores, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_default_learning_rate_falls_with_width_and_length(examples, scores, tmp_path):
    assert default_learning_rate(2000, 100) == pytest.approx(7.5e-4)
    assert default_learning_rate(2000, 10**6) == pytest.approx(5e-4, rel=1e-3)
    assert default_learning_rate(2000, 100, passes=4) == pytest.approx(7.5e-4 / 2)
    assert default_learning_rate(2000, 100, passes=0.1) == default_learning_rate(2000, 100)
    assert default_learning_rate(8000, 100) == pytest.approx(7.5e-4 * 4**-0.781)
    _, run = trained(examples, scores, tmp_path / "run", steps=1, learning_rate=None)
    assert run.metrics.settings.learning_rate == pytest.approx(default_learning_rate(32, 1))


def test_evaluations_are_even_and_end_at_the_last_step(examples, scores, tmp_path):
    assert due_steps(150, 4) == {38, 75, 112, 150}
    assert due_steps(3, 4) == {1, 2, 3}
    assert due_steps(1, 4) == {1}
    _, run = trained(examples, scores, tmp_path / "run", evaluations=2)
    assert [point.step for point in run.metrics.held_out_curve] == [0, 6, 12]


def test_a_run_folder_that_is_not_finished_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no finished run \(no metrics.json\)"):
        Run.read(tmp_path)


def test_bfloat16_bases_train_with_float32_adapters(examples, scores, tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    adapted, run = trained(examples, scores, tmp_path / "run", model)
    assert run.metrics.settings.dtype == "bfloat16"
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert run.metrics.held_out_loss_after < run.metrics.held_out_loss_before


def test_the_plan_beside_the_run_is_the_plan(examples, scores, tmp_path):
    _, run = trained(examples, scores, tmp_path / "run", steps=1)
    assert Plan.read(tmp_path / "run" / "plan.json") == run.plan


# --- the settings of Trainer, and which point of the run is kept


def curve(run):
    return [point.loss for point in run.metrics.train_curve]


def test_fields_of_trainer_are_taken(examples, scores, tmp_path, monkeypatch):
    trainers = []

    class Seen(train_module.RowTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

    monkeypatch.setattr(train_module, "RowTrainer", Seen)
    curves = {}
    for name, settings in {
        "default": {}, "schedule": {"lr_scheduler_type": "constant_with_warmup"}, "beta": {"adam_beta2": 0.5},
    }.items():  # fmt: skip
        _, run = trained(examples, scores, tmp_path / name, steps=4, evaluations=1, **settings)
        curves[name] = curve(run)
    assert trainers[1].args.lr_scheduler_type == "constant_with_warmup"
    assert trainers[2].optimizer.param_groups[0]["betas"][1] == 0.5
    assert len({tuple(losses) for losses in curves.values()}) == 3
    assert len({losses[0] for losses in curves.values()}) == 1
    with pytest.raises(SettingsError, match=r"Trainer refuses these settings: .*chaotic"):
        trained(examples, scores, tmp_path / "run", lr_scheduler_type="chaotic")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(NOT_TAKEN))
def test_fields_of_trainer_that_contradict_us_are_refused_with_the_reason(name):
    with pytest.raises(SettingsError) as raised:
        TrainSettings(**{name: 1})
    assert str(raised.value) == f"`{name}` cannot be set; expected it to be left out: {NOT_TAKEN[name]}"


def test_accumulated_batches_are_one_larger_batch(examples, scores, tmp_path):
    common = {"steps": 8, "evaluations": 1}
    _, whole = trained(examples, scores, tmp_path / "whole", batch_size=8, **common)
    _, parts = trained(examples, scores, tmp_path / "parts", batch_size=2, gradient_accumulation_steps=4, **common)
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-5)
    assert parts.metrics.held_out_loss_after == pytest.approx(whole.metrics.held_out_loss_after, rel=1e-5)
    assert parts.metrics.tokens == whole.metrics.tokens
    assert parts.metrics.settings.gradient_accumulation_steps == 4


@pytest.fixture
def held_out_losses(monkeypatch):
    """Held-out losses that fall and rise again, and the weights each time one is taken."""
    seen = []

    def listed(model, *given):
        seen.append({name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name})
        return [5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 2.0][len(seen) - 1]

    monkeypatch.setattr(loop, "loss_over", listed)
    return seen


@pytest.mark.parametrize(
    ("settings", "steps", "kept", "after"),
    [
        ({}, 10, 4, 3.0),
        ({"keep": "last", "early_stop": False}, 12, 12, 2.0),
        ({"early_stop": False, "steps": 10, "evaluations": 5}, 10, 4, 3.0),
        ({"early_stopping_patience": 2}, 8, 4, 3.0),
        ({"keep": "last", "early_stopping_patience": 2}, 8, 8, 3.6),
    ],
    ids=["default", "planned length, last", "planned length, best", "stopped sooner, best", "stopped sooner, last"],
)
def test_the_point_that_is_kept(examples, scores, tmp_path, held_out_losses, settings, steps, kept, after):
    common = {"evaluations": 6, "batch_size": 2, "rescale": False}
    _, run = trained(examples, scores, tmp_path / "run", **common | settings)
    metrics = run.metrics
    assert (metrics.steps, metrics.kept_step, metrics.held_out_loss_after) == (steps, kept, after)
    assert metrics.steps_saved == (settings.get("steps") or 12) - steps
    assert [point.step for point in metrics.held_out_curve] == list(range(0, steps + 1, 2))
    assert [point.step for point in metrics.train_curve] == list(range(1, steps + 1))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, value in held_out_losses[kept // 2].items():
        assert torch.equal(saved[name.replace(".default", "")], value), name
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_goes_on_remembers_how_long_the_loss_has_not_fallen(examples, scores, tmp_path, monkeypatch):
    """Lowest after step 4 and broken off at step 8, it stops three evaluations later, as if nothing had been."""
    losses = iter([5.0, 4.0, 3.0, 3.5, None, 3.6, 3.7, 2.0])

    def listed(*given):
        loss = next(losses)
        if loss is None:
            raise RuntimeError("broken off")
        return loss

    monkeypatch.setattr(loop, "loss_over", listed)
    settings = {"evaluations": 6, "batch_size": 2, "save_steps": 2, "save_total_limit": 5, "rescale": False}
    with pytest.raises(RuntimeError, match="broken off"):
        trained(examples, scores, tmp_path / "run", **settings)
    with RunFolder.claim(tmp_path / "run", resume="auto") as folder:
        _, run = trained(examples, scores, folder, **settings)
    assert (run.metrics.steps, run.metrics.kept_step, run.metrics.held_out_loss_after) == (10, 4, 3.0)


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"steps": 5}, 2),
        ({"epochs": 0.25}, 1),
        ({"steps": 1}, 1),
        ({"epochs": 3}, 12),
        ({"steps": 25}, 10),
        ({"epochs": 3, "evaluations": 2}, 2),
        ({"eval_steps": 3}, 0),
    ],
)
def test_the_held_out_loss_is_taken_four_times_a_pass(settings, evaluations):
    assert evaluations_of(40, TrainSettings(batch_size=4, **settings)) == evaluations


def test_checkpoints_that_were_asked_for_stay(examples, scores, tmp_path):
    trained(examples, scores, tmp_path / "run", steps=6, evaluations=1, save_steps=2, save_total_limit=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_gradient_that_is_not_finite_is_never_saved(examples, scores, tmp_path):
    model = make_model("llama")
    plan = make_plan(scores["llama"], policy="last")
    adapted_model = adapt(model, plan)
    calls = []

    def spoil(gradient):
        calls.append(gradient)
        return gradient * float("inf") if len(calls) == 4 else gradient

    next(value for value in adapted_model.parameters() if value.requires_grad).register_hook(spoil)
    data, held_out = examples.subset(range(20)), examples.subset(range(20, 25))
    with pytest.raises(
        TrainingError,
        match=r"the gradient in layer \d \(model.layers.*lora_A.weight\) is not finite, at step 4.*not saved",
    ):
        train(adapted_model, data, plan, tmp_path / "run", held_out, steps=9, save_steps=1, show_progress=False)
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()
    kept = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))[-1]
    assert all(value.isfinite().all() for value in load_file(kept / "adapter_model.safetensors").values())
