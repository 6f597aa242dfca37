"""Which tokenizer rows, plans, runs and evaluations belong to: another one is refused, with both named."""

from dataclasses import replace
from functools import partial

import pytest
from tiny import CHATML, make_model, make_tokenizer

import aletheia
from aletheia.adapters.adapt import adapt
from aletheia.anatomy.load import Loaded
from aletheia.data.encode import load_data
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import AdapterError, EvaluationError, PlanError, TrainingError
from aletheia.lab.evaluation.against import compare
from aletheia.lab.evaluation.evaluate import eval_settings, evaluate, with_adapter
from aletheia.lab.evaluation.journal import JOURNAL_FILE, Journal
from aletheia.planning.make import plan
from aletheia.probing.resident import probe
from aletheia.reporting.comparison import differences
from aletheia.runs.schema import Run
from aletheia.training import train as train_module

OTHER_TEMPLATE = CHATML.replace("<|im_end|>\n", "<|im_end|>")
TRAINING = {"steps": 4, "batch_size": 2, "evaluations": 1}
VOCABULARIES, TEMPLATES = "their vocabularies differ", "their chat templates differ"


def other_vocabulary():
    """Begins every text with a token of its own."""
    return make_tokenizer(bos=True)


@pytest.fixture(scope="module")
def planned(examples):
    return plan(probe(make_model(), examples, batches=1), policy="last")


@pytest.fixture
def job(model_folder, data_file):
    data = {"data": [str(data_file)], "max_length": 64, "eval_fraction": 0.1}
    return partial(aletheia.fine_tune, data=data, plan={"policy": "last"}, say=lambda line: None)


@pytest.fixture
def folder_with(model_folder, tmp_path):
    """Put another tokenizer into a model folder that keeps its name."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)

    def put(tokenizer):
        tokenizer.save_pretrained(folder)
        return str(folder)

    return put


def test_only_what_changes_tokens_counts(tokenizer):
    same = identify_tokenizer(tokenizer)
    again = make_tokenizer()
    again.pad_token = "<s>"
    again(["a", "a longer one"], padding=True, truncation=True, max_length=4)  # leaves its mark on the tokenizer
    assert same.difference(identify_tokenizer(again)) is None
    assert same.difference(identify_tokenizer(make_tokenizer(OTHER_TEMPLATE))) == "chat templates"
    assert same.difference(identify_tokenizer(make_tokenizer(None))) == "chat templates"
    for other in (other_vocabulary(), make_tokenizer(eos=False)):
        assert same.difference(identify_tokenizer(other)) == "vocabularies"
    more = make_tokenizer()
    more.add_tokens(["<think>"])
    assert same.difference(identify_tokenizer(more)) == "vocabularies"
    assert same.without_template().difference(identify_tokenizer(make_tokenizer(None))) is None


@pytest.mark.parametrize(
    ("used", "told"), [(other_vocabulary(), VOCABULARIES), (make_tokenizer(OTHER_TEMPLATE), TEMPLATES)]
)
def test_rows_of_another_tokenizer_do_not_follow_a_plan(planned, data_file, tmp_path, used, told):
    rows = load_data(str(data_file), used, 64)
    with pytest.raises(PlanError, match=told) as caught:
        aletheia.train(adapt(make_model(), planned), rows, planned, tmp_path / "run", rows, steps=1)
    for one in (planned.tokenizer, identify_tokenizer(used)):
        assert str(one) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("used", "told"), [(other_vocabulary(), VOCABULARIES), (make_tokenizer(OTHER_TEMPLATE), TEMPLATES)]
)
def test_a_job_refuses_a_plan_of_another_tokenizer(planned, job, folder_with, tmp_path, used, told):
    planned.write(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=told):
        job(folder_with(used), out=tmp_path / "run", plan=tmp_path / "plan.json", training=TRAINING)
    run = job(folder_with(make_tokenizer()), out=tmp_path / "run", plan=tmp_path / "plan.json", training=TRAINING)
    assert run.metrics.tokenizer.difference(planned.tokenizer) is None


def test_a_run_does_not_go_on_with_another_tokenizer(job, folder_with, tmp_path, monkeypatch):
    def interrupted(*given, **named):
        raise TrainingError("enough")

    folder = folder_with(make_tokenizer())
    training = TRAINING | {"save_steps": 2}
    monkeypatch.setattr(train_module.Job, "_finish", interrupted)
    with pytest.raises(TrainingError, match="enough"):
        job(folder, out=tmp_path / "run", training=training)
    monkeypatch.undo()
    folder_with(make_tokenizer(OTHER_TEMPLATE))
    with pytest.raises(PlanError, match=TEMPLATES):
        job(folder, out=tmp_path / "run", training=training)
    folder_with(make_tokenizer())
    assert Run.read(job(folder, out=tmp_path / "run", training=training).path).metrics.steps == 4


def test_an_adapter_is_evaluated_with_its_tokenizer(job, model_folder, data_file, tmp_path):
    """Another vocabulary is refused; the chat template is that of the run folder."""
    run = job(str(model_folder), out=tmp_path / "run", training=TRAINING)
    adapter, shown = run.path, str(run.metrics.tokenizer)
    held_out = eval_settings(None, adapter, model="tiny", tasks=["heldout"], eval_data=str(data_file), limit=2)
    plain = held_out.model_copy(update={"tasks": ("wikitext",), "eval_data": None})
    for tokenizer, settings, told in (
        (other_vocabulary(), plain, VOCABULARIES),
        (other_vocabulary(), held_out, VOCABULARIES),
    ):
        with pytest.raises(AdapterError, match=told) as caught:
            with_adapter(Loaded(make_model(), tokenizer, None), adapter, settings)
        assert shown in str(caught.value)
        assert "\n" not in str(caught.value)
    for tokenizer, settings in ((make_tokenizer(), held_out), (make_tokenizer(OTHER_TEMPLATE), held_out)):
        with_adapter(Loaded(make_model(), tokenizer, None), adapter, settings)
        assert tokenizer.chat_template == make_tokenizer().chat_template  # the run folder holds it


def test_evaluations_with_different_tokenizers_are_not_compared(data_file, tmp_path):
    done = []
    for name, tokenizer in (("one", make_tokenizer()), ("other", other_vocabulary())):
        settings = eval_settings(None, None, model="tiny", tasks=["heldout"], eval_data=str(data_file), limit=2)
        done.append(evaluate(Loaded(make_model(), tokenizer, None), settings, tmp_path / name, show_progress=False))
    with pytest.raises(EvaluationError, match=r"uses the tokenizer .*, .*other uses .*; expected the same"):
        compare(*done)
    header = {"tokenizer": done[0].evaluation.tokenizer.model_dump(exclude={"name"})}
    Journal(tmp_path / "journal", header)
    with pytest.raises(EvaluationError, match=r"tokenizer: vocabulary .* here, .* there"):
        Journal(tmp_path / "journal", {"tokenizer": done[1].evaluation.tokenizer.model_dump(exclude={"name"})})
    assert (tmp_path / "journal" / JOURNAL_FILE).exists()


def test_a_report_names_tokenizers_that_differ(job, model_folder, tmp_path):
    run = job(str(model_folder), out=tmp_path / "run", training=TRAINING)
    changed = identify_tokenizer(make_tokenizer(OTHER_TEMPLATE))
    other = replace(run, metrics=run.metrics.model_copy(update={"tokenizer": changed}))
    assert [line.partition(" ")[0] for line in differences([run, other])] == ["tokenizer"]
    assert differences([run, run]) == ()


def test_a_trainer_with_another_tokenizer_is_not_attached_to(planned, examples, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    for tokenizer, fits in ((make_tokenizer(OTHER_TEMPLATE), True), (other_vocabulary(), False)):
        trainer = Trainer(adapt(make_model(), planned), arguments, processing_class=tokenizer)
        if fits:
            aletheia.attach(trainer, planned)
        else:
            with pytest.raises(PlanError, match=VOCABULARIES):
                aletheia.attach(trainer, planned)
