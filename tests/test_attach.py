"""Attached to Trainer and SFTTrainer: the same losses, no backward below the boundary, nothing left behind."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_prefix import Spy
from tiny import make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import aletheia
from aletheia.adapters.acting import adapted_in
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.errors import AdapterError, CacheError, SettingsError, TrainingError
from aletheia.prefix.spans import find_spans
from aletheia.training.attach import attach, reads
from aletheia.training.phases import Phase, is_last_epoch, phase_at, phases, rows_come_back

STEPS, ROWS, RATE = 18, 24, 5e-3
EPSILON = 1e-4  # or Adam takes a whole step along a gradient that is nothing but rounding

# what is tried on SFTTrainer, and what it is given for it
TRAINERS = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "re-entrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "packing": {"packing": True, "max_length": 128},
    "padding free": {"padding_free": True, "max_length": None},
    "assistant only": {"assistant_only_loss": True},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5},
    "best at the end": {
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "steps",
        "save_steps": 6,
        "load_best_model_at_end": True,
    },
}


@pytest.fixture(scope="module")
def plan(examples):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    scores = aletheia.probe(make_model(), examples, batches=2)
    return aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25)


class FreezeByHand(TrainerCallback):
    """What a plan with early layers means, in plain Trainer."""

    def __init__(self, plan):
        self.plan = plan

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.plan.early_steps(state.max_steps):
            find_layers(model)[1][: self.plan.boundary].requires_grad_(False)


def conversations(examples):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"say {n}"},
                    {"role": "assistant", "content": "word " * (n % 5 + 1)},
                ]
            }
            for n in range(ROWS)
        ]
    )


def tokenised(rows):
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def sft(examples, tokenizer, plan, folder, **settings):
    """TRL's trainer over tiny rows: adapted, but nothing attached."""
    trl = pytest.importorskip("trl")
    ours = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE, "logging_steps": 1}
    ours |= {"adam_epsilon": EPSILON}
    config = trl.SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        **ours | settings,
    ) if "save_strategy" not in settings else trl.SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **ours | settings,
    )  # fmt: skip
    rows = tokenised(examples.examples[:ROWS])
    if settings.get("assistant_only_loss"):
        rows = conversations(examples)
        tokenizer = marked(tokenizer)
    held_out = tokenised(examples.examples[ROWS : ROWS + 8]) if "eval_strategy" in settings else None
    model = make_model()
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=plan.lora_config(model),
    )


def marked(tokenizer):
    """The tokenizer with a template that tells what the assistant says."""
    from tiny import make_tokenizer

    return make_tokenizer(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}"
        "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def logged(trainer, name="loss"):
    return torch.tensor([log[name] for log in trainer.state.log_history if name in log], dtype=torch.float64)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def largest_difference(one, other):
    assert len(one) == len(other) > 0
    return ((one - other).abs() / other.abs()).max().item()


@pytest.mark.parametrize("kind", TRAINERS)
def test_sft_trainer_learns_the_same(kind, examples, tokenizer, plan, tmp_path):
    settings = TRAINERS[kind]
    plain = sft(examples, tokenizer, plan, tmp_path / "plain", **settings)
    plain.add_callback(FreezeByHand(plan))
    start = weights(plain.model)
    plain.train()
    trainer = sft(examples, tokenizer, plan, tmp_path / "attached", **settings)
    trainer.model.load_state_dict(start, strict=False)
    attachment = attach(trainer, plan)
    trainer.train()
    assert largest_difference(logged(trainer), logged(plain)) < 1e-6
    assert attachment.decision.kind == "memory", attachment.decision.reason
    assert "hidden states at labelled positions" in attachment.ways
    for name in ("entropy", "mean_token_accuracy"):
        torch.testing.assert_close(logged(trainer, name), logged(plain, name), rtol=1e-5, atol=1e-6)
    if "eval_strategy" in settings:
        assert largest_difference(logged(trainer, "eval_loss"), logged(plain, "eval_loss")) < 1e-6
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], value, rtol=1e-4, atol=1e-6)


def make_trainer(examples, plan, folder, cls=Trainer, family="llama", **settings):
    """transformers' Trainer over tiny rows."""
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE, "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        **{"save_strategy": "no"} | given | settings,
    )  # fmt: skip
    model = aletheia.adapt(make_model(family), plan)
    collator = partial(collate, pad_token_id=0)
    held_out = examples.subset(range(ROWS, ROWS + 8))
    return cls(model, arguments, collator, train_dataset=examples.subset(range(ROWS)), eval_dataset=held_out)


@pytest.fixture(scope="module")
def plain_losses(examples, plan, tmp_path_factory):
    """What plain Trainer logs with these settings; computed once for each."""
    made = {}

    def of(**settings):
        key = str(settings)
        if key not in made:
            plain = make_trainer(examples, plan, tmp_path_factory.mktemp("plain"), **settings)
            plain.add_callback(FreezeByHand(plan))
            plain.train()
            made[key] = logged(plain), logged(plain, "eval_loss")
        return made[key]

    return of


@pytest.mark.parametrize("cache", ["auto", "memory", "disk", "off"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "re-entrant", "not re-entrant"])
def test_trainer_learns_the_same(cache, checkpointing, examples, plan, plain_losses, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 4}
    if checkpointing is not None:
        kwargs = {"use_reentrant": checkpointing}
        settings |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
    losses, held_out_losses = plain_losses(**settings)
    trainer = make_trainer(examples, plan, tmp_path / "attached", **settings)
    attachment = attach(trainer, plan, aletheia.AttachSettings(cache=cache, cache_dir=tmp_path / "cache"))
    trainer.train()
    assert largest_difference(logged(trainer), losses) < 1e-6
    assert largest_difference(logged(trainer, "eval_loss"), held_out_losses) < 1e-6
    assert attachment.decision.kind == ("memory" if cache == "auto" else cache)
    assert not list((tmp_path / "cache").glob("*"))  # of use to no other run
    assert "logits at labelled positions" in attachment.ways


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_as_it_was(fails, examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path)
    model = trainer.model
    batch = collate(examples.examples[:3], 0)

    def hooks():
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
            for module in model.modules()
        )

    before, layers = hooks(), list(find_layers(model)[1])
    attach(trainer, plan)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if fails and state.global_step == 10:
                raise BrokenError

    trainer.add_callback(Stop())
    try:
        trainer.train()
        assert not fails
    except BrokenError:
        assert fails
    assert hooks() == before
    assert list(find_layers(model)[1]) == layers
    assert all(value.requires_grad for name, value in model.named_parameters() if "lora_" in name)
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_no_backward_below_the_boundary_and_the_prefix_runs_once_per_row(examples, plan, tmp_path):
    """Three epochs of six steps: after the early steps each row passes the lower layers once, held-out rows too."""
    trainer = make_trainer(examples, plan, tmp_path, eval_strategy="steps", eval_steps=6)
    attach(trainer, plan)
    spy = Spy(trainer.model)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = (set(spy.backward), dict(spy.calls))
            spy.backward.clear()

    trainer.add_callback(Look())
    trainer.train()
    early = plan.early_steps(STEPS)
    assert early == 4
    assert all(0 in seen[step][0] for step in range(1, early + 1))
    assert all(seen[step][0] == {2, 3} for step in range(early + 1, STEPS + 1))
    assert seen[STEPS][1][0] == seen[12][1][0]  # in the third epoch nothing is left to compute


def test_rows_that_do_not_come_back_are_not_stored(examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path, max_steps=6)  # one epoch
    attachment = attach(trainer, plan)
    trainer.train()
    assert attachment.decision.size_bytes == 0


def test_generation_in_the_middle_of_a_run(examples, plan, tmp_path):
    """A callback that generates gets the model's own layers: a key-value cache needs all of them."""
    texts = []

    class Say(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 10:
                ids = torch.tensor([examples[0].input_ids])
                model.eval()
                texts.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist())
                model.train()

    for own in (False, True):
        trainer = make_trainer(examples, plan, tmp_path)
        trainer.add_callback(Say() if own else FreezeByHand(plan))
        trainer.add_callback(Say()) if not own else attach(trainer, plan)
        trainer.train()
    assert texts[0] == texts[1]


def test_adapters_that_are_switched_off_have_a_prefix_of_their_own(examples, plan, tmp_path):
    """A reference pass, as DPO takes it, over rows whose states are stored with the adapters on."""
    trainer = make_trainer(examples, plan, tmp_path)
    attach(trainer, plan)
    batch = collate(examples.examples[:4], 0)
    batch.pop("labels")
    found = []

    class Refer(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 14:
                with torch.no_grad(), model.disable_adapter():
                    found.append(model(**batch).logits)

    trainer.add_callback(Refer())
    trainer.train()
    with torch.no_grad():
        expected = make_model()(**batch).logits
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_another_scale_have_a_prefix_of_their_own(examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path)
    attach(trainer, plan)
    batch = collate(examples.examples[:4], 0)
    found = []

    class Rescale(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 14:
                for module in adapted_in(find_layers(model)[1][0]):
                    module.scaling["default"] *= 3
                with torch.no_grad():
                    found.extend(
                        called(**batch).loss for called in (model, model.base_model)
                    )  # with its hooks, without

    trainer.add_callback(Rescale())
    trainer.train()
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_logits_are_whole_where_somebody_reads_them(examples, plan, tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            assert outputs.logits.shape[:2] == inputs["input_ids"].shape
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer = make_trainer(examples, plan, tmp_path, cls=Own, max_steps=2)
    assert reads(trainer) == "logits"
    attachment = attach(trainer, plan)
    trainer.train()
    assert "logits at labelled positions" not in attachment.ways
    smoothed = make_trainer(examples, plan, tmp_path, label_smoothing_factor=0.1)
    assert reads(smoothed) == "logits"
    assert reads(make_trainer(examples, plan, tmp_path)) == "loss"


def test_fast_steps_can_be_left_out(examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path, max_steps=2)
    attachment = attach(trainer, plan, aletheia.AttachSettings(fast_steps=False))
    trainer.train()
    assert attachment.ways == ()


def test_a_run_resumed_by_trainer_itself_ends_the_same(examples, plan, tmp_path):
    """Phases follow from the step alone; the cache fills again on the frozen adapters as they were."""
    settings = {"save_strategy": "steps", "save_steps": 9}
    whole = make_trainer(examples, plan, tmp_path / "run", **settings)
    attach(whole, plan)
    whole.train()
    again = make_trainer(examples, plan, tmp_path / "run", **settings)
    attach(again, plan)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_resuming_takes_the_newest_whole_checkpoint_of_the_same_plan(examples, plan, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(examples, plan, tmp_path, **settings)
    attach(whole, plan)
    whole.train()
    damaged = tmp_path / "checkpoint-18" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = make_trainer(examples, plan, tmp_path, **settings)
    attach(again, plan)
    steps = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    again.add_callback(Look())
    again.train(resume_from_checkpoint=True)
    assert steps == [12]
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name
    scores = aletheia.probe(make_model(), examples, batches=2)
    other_plan = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.5)
    other = make_trainer(examples, other_plan, tmp_path, **settings)
    attach(other, other_plan)
    with pytest.raises(TrainingError, match="`plan_fingerprint`"):
        other.train(resume_from_checkpoint=True)


def test_what_cannot_be_attached_to_is_refused(examples, plan, tmp_path):
    trainer = make_trainer(examples, plan, tmp_path)
    attach(trainer, plan)
    with pytest.raises(TrainingError, match="attached to this trainer already"):
        attach(trainer, plan)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TrainingError, match=r"without adapters; expected the adapters of the plan"):
        attach(Trainer(make_model(), arguments), plan)
    other = plan.model_copy(update={"adapters": plan.adapters[1:]})
    with pytest.raises(AdapterError, match="differ from the plan"):
        attach(make_trainer(examples, plan, tmp_path), other)
    compiled = make_trainer(examples, plan, tmp_path)
    compiled.args.torch_compile = True
    with pytest.raises(TrainingError, match="the trainer has torch_compile"):
        attach(compiled, plan)
    with pytest.raises(SettingsError, match="`cache` is 'ram'; expected one of auto, memory, disk, off"):
        aletheia.AttachSettings(cache="ram")


def test_a_cache_that_was_asked_for_and_cannot_be_is_an_error_before_the_first_step(examples, tmp_path):
    scores = aletheia.probe(make_model(), examples, batches=2)
    plan = aletheia.plan(scores, policy="last", rank=4, freeze_after=0.0)
    trainer = make_trainer(examples, plan, tmp_path, max_steps=12)
    trainer.model.get_base_model().config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4}
    layers = find_layers(trainer.model)[1]
    layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    attach(trainer, plan, aletheia.AttachSettings(cache="memory"))
    with pytest.raises(
        CacheError, match="`cache` is memory, which is not possible: the layers below the boundary are random"
    ):
        trainer.train()
    trainer = make_trainer(examples, plan, tmp_path, max_steps=12)
    layers = find_layers(trainer.model)[1]
    layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    lines = []
    attachment = attach(trainer, plan, notify=lines.append)
    trainer.train()
    assert attachment.decision.kind == "off"
    assert "are random (dropout)" in lines[0]


GSM8K = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")) / "gsm8k"


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}; set ALETHEIA_DATA")
def test_sft_trainer_on_smollm2_and_gsm8k(tmp_path):
    """SFTTrainer with its defaults but float32, 30 steps over two epochs and a half: losses within 1e-6."""
    trl = pytest.importorskip("trl")
    base = aletheia.load(str(demo_checkpoint()), "float32")
    data = aletheia.load_data(str(GSM8K / "train.jsonl"), base.tokenizer)
    scores = aletheia.probe(base.model, data, batches=1)
    plan = aletheia.plan(scores, policy="last", freeze_after=0.25)
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()[:48]]
    conversations = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    curves = []
    for own in (False, True):
        model = aletheia.adapt(base.model, plan)
        config = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, logging_steps=1, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, config, train_dataset=Dataset.from_list(conversations), processing_class=base.tokenizer
        )
        if own:
            attachment = attach(trainer, plan)
        else:
            trainer.add_callback(FreezeByHand(plan))
        trainer.train()
        curves.append(logged(trainer))
        model.unload()
    print(f"SmolLM2, SFTTrainer, 30 steps: {largest_difference(*curves):.1e}; cache {attachment.decision}")
    assert largest_difference(*curves) < 1e-6
    assert attachment.decision.kind == "memory"


# --- phases


def test_phases_follow_from_plan_and_length(plan):
    assert phases(plan, 100) == [Phase(0, 0), Phase(25, 2)]
    assert phases(plan, 1) == [Phase(0, 2)]
    listed = phases(plan, 100)
    assert [phase_at(listed, step).boundary for step in (0, 24, 25, 99)] == [0, 0, 2, 2]


def test_which_rows_come_back():
    assert not rows_come_back(3, 10, 10)
    assert rows_come_back(3, 11, 10)
    assert not rows_come_back(3, 11, None)
    assert [is_last_epoch(step, 25, 10) for step in (0, 19, 20, 24)] == [False, False, True, True]


# --- rows in a batch


def spans(**batch):
    found = find_spans({name: torch.tensor(value) for name, value in batch.items()})
    return None if found is None else [(span.sample, span.start, span.row.input_ids) for span in found]


def test_rows_are_found_by_mask_or_by_positions():
    ids = [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert spans(input_ids=ids, attention_mask=[[1, 1, 1, 0], [1, 1, 0, 0]]) == [(0, 0, [5, 6, 7]), (1, 0, [8, 9])]
    assert spans(input_ids=[[5, 6, 7, 8, 9]], position_ids=[[0, 1, 2, 0, 1]]) == [(0, 0, [5, 6, 7]), (0, 3, [8, 9])]
    assert spans(input_ids=ids) == [(0, 0, [5, 6, 7, 0]), (1, 0, [8, 9, 0, 0])]


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]]},  # padded on the left
        {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]},
        {"input_ids": [[5, 6, 7]], "position_ids": [[3, 4, 5]]},  # positions that go on from elsewhere
        {"input_ids": [[5, 6, 7]], "position_ids": [[0, 1, 3]]},
        {"input_ids": [[5, 6]], "attention_mask": [[[[1, 0], [1, 1]]]]},
        {"input_ids": [[5, 6]], "token_type_ids": [[0, 1]]},  # nobody here knows what it does
        {"input_ids": [[5, 6]], "cu_seq_lens_q": [0, 1, 2]},  # packed, without positions
        {"inputs_embeds": [[[0.1]]]},
    ],
)
def test_other_batches_are_left_to_the_layers(batch):
    assert spans(**batch) is None
