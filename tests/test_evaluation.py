"""``aletheia eval`` on a tiny model and small files in upstream's format: resumed, compared, and every bad input."""

import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import forked
import numpy as np
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import as_flags, make_model

import aletheia
from aletheia.errors import AdapterError, DataError, EvaluationError
from aletheia.lab.evaluation import humaneval, sandbox
from aletheia.lab.evaluation.evaluate import language_model
from aletheia.lab.evaluation.journal import JOURNAL_FILE, Journal
from aletheia.lab.evaluation.local_data import local_splits, pages
from aletheia.lab.evaluation.measures import differences, summarise
from aletheia.lab.evaluation.record import single_answer
from aletheia.lab.evaluation.row_loss import HeldOut
from aletheia.lab.evaluation.upstream import load_tasks, task_version
from aletheia.lab.evaluation.work import Benchmark, chosen

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'aletheia-tune[eval]'")
SUBJECTS = ("anatomy", "astronomy", "virology")
QUICK = ("--max-new-tokens", 4, "--batch-size", 4)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory):
    """A few rows of every benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    mmlu = [
        {"subject": subject, "question": f"{subject} {i}: {i} + 1?", "choices": ["1", "2", "3", "4"], "answer": i % 4}
        for subject in SUBJECTS
        for i in range(7)
    ]
    write_rows(folder / "mmlu/test.jsonl", mmlu)
    write_rows(folder / "mmlu/dev.jsonl", [row for row in mmlu if row["question"][-6] in "01"])
    sums = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)]
    write_rows(folder / "gsm8k/test.jsonl", sums[:6])
    write_rows(folder / "gsm8k/train.jsonl", sums)
    functions = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def add_{i}(a):\n",
            "canonical_solution": f"    return a + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(4)
    ]
    write_rows(folder / "humaneval/HumanEval.jsonl", functions)
    text = "".join(f" \n = Title {i} = \n \n Words of page {i} . \n = = Part = = \n More . \n" for i in range(5))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/test_raw.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def base(model_folder):
    return aletheia.load(str(model_folder), "float32")


@pytest.fixture(scope="module")
def lm(base):
    return language_model(base.model, base.tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def adapter(base, model_folder, tmp_path_factory):
    """A plain PEFT adapter of the tiny model whose B is not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    model = aletheia.load(str(model_folder), "float32").model
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def evaluation(call, model_folder, data, out, *more, tasks="mmlu,gsm8k,wikitext"):
    code, stdout, err = call("eval", model_folder, "--tasks", tasks, "--data-dir", data, "--out", out, *QUICK, *more)
    assert code == 0, err
    return stdout, err


# --- tasks


def test_prompts_filters_and_versions_are_upstreams(benchmark_data):
    mmlu = load_tasks("mmlu", benchmark_data, num_fewshot=2)
    assert tuple(mmlu) == SUBJECTS
    assert task_version("mmlu", mmlu) == "2 (subjects 1.0)"
    task = mmlu["anatomy"]
    prompt = task.fewshot_context(task.eval_docs[3], num_fewshot=2)
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nanatomy 0")
    assert prompt.endswith("anatomy 3: 3 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    gsm8k = load_tasks("gsm8k", benchmark_data)[""]
    assert (gsm8k.config.num_fewshot, str(gsm8k.VERSION)) == (5, "3.0")
    assert [one.name for one in gsm8k._filters] == ["strict-match", "flexible-extract"]
    assert load_tasks("humaneval", benchmark_data, num_fewshot=3)[""].config.num_fewshot == 0


def test_mmlu_has_a_task_for_each_of_57_subjects():
    from aletheia.lab.evaluation.upstream import _configs

    configs = _configs("mmlu")
    assert len(configs) == 57
    assert all(config["description"] for config in configs.values())


def test_without_local_files_the_hub_is_asked():
    with pytest.raises(EvaluationError, match=r"cannot get the data of gsm8k from the hub .*`data_dir`"):
        load_tasks("gsm8k", None)


def test_wikitext_is_cut_at_titles_only(benchmark_data):
    found = pages((benchmark_data / "wikitext2/test_raw.txt").read_text())
    assert len(found) == 5
    assert found[0].startswith(" = Title 0 = \n \n Words")
    assert " = = Part = = " in found[0]


def test_limits_take_evenly_spaced_items():
    assert chosen(10, None) == chosen(10, 12) == list(range(10))
    assert chosen(10, 5) == [1, 3, 5, 7, 9]
    assert chosen(14042, 200) == sorted(set(chosen(14042, 200)))


@pytest.mark.parametrize("name", ["mmlu", "gsm8k", "wikitext"])
def test_answers_equal_those_of_lm_evals_own_loop(name, benchmark_data, lm):
    """The same items through ``lm_eval.evaluate``: every number, to the last digit."""
    from lm_eval import evaluate

    work = Benchmark(name, load_tasks(name, benchmark_data, None, 4), lm, limit=5)
    answers = {}
    for batch in work.batches():
        answers |= dict(zip(batch, work.answer(batch), strict=True))
    rows = work.rows([answers[at] for at in range(len(work))])
    tasks = load_tasks(name, benchmark_data, None, 4)
    tasks = {task.task_name: task for task in tasks.values() if task.task_name in work.samples}
    expected = evaluate(lm, {"tasks": tasks}, samples=work.samples, bootstrap_iters=0)
    found = {metric.name: metric.value for metric in summarise(name, rows)}
    if name == "mmlu":
        direct = [sample["acc"] for task in work.samples for sample in expected["samples"][task]]
        assert [row["acc"] for row in rows] == direct
        assert found["acc"] == pytest.approx(np.mean(direct))
    else:
        results = expected["results"][name]
        assert found == {key: pytest.approx(results[key if "," in key else f"{key},none"]) for key in found}


def test_log_probabilities_of_bfloat16_models_are_float32(model_folder):
    """In the model's dtype, as lm-eval leaves it, this document's loss would be a multiple of 1/2 at best."""
    base = aletheia.load(str(model_folder), "bfloat16")
    lm = language_model(base.model, base.tokenizer, batch_size=1)
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode("Words of a page. " * 4)]])
    with torch.no_grad():
        logits_TV = base.model(ids).logits[0, :-1]
    expected = torch.log_softmax(logits_TV.float(), -1).gather(1, ids[0, 1:, None]).sum().item()
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood_rolling", {}, ("Words of a page. " * 4,), 0)
    (found,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != torch.tensor(found).bfloat16().item()


def test_held_out_rows_give_the_held_out_loss(base, examples):
    work = HeldOut(base.model, examples, batch_size=7)
    answers = {}
    for batch in work.batches():
        answers |= dict(zip(batch, work.answer(batch), strict=True))
    (loss,) = summarise("heldout", work.rows([answers[at] for at in range(len(work))]))
    assert loss.value == pytest.approx(aletheia.held_out_loss(base.model, examples), rel=1e-6)
    assert loss.low < loss.value < loss.high


# --- intervals


def test_intervals_of_perplexities_are_those_of_the_bootstrap():
    draw = np.random.default_rng(0)
    words = draw.integers(100, 2000, 200)
    pages = [
        [
            {"loss_sum": nats * count, "words": count, "bytes": 5 * count}
            for nats, count in zip(losses, words, strict=True)
        ]
        for losses in (draw.normal(3.0, 0.3, 200), draw.normal(3.1, 0.3, 200))
    ]
    one, two = (np.array([page["loss_sum"] for page in side]) for side in pages)
    drawn = draw.integers(0, 200, (4000, 200))
    first, second = (np.exp(sums[drawn].sum(axis=1) / words[drawn].sum(axis=1)) for sums in (one, two))
    perplexity, *_ = summarise("wikitext", pages[0])
    assert (perplexity.low, perplexity.high) == pytest.approx(np.quantile(first, [0.025, 0.975]), rel=0.01)
    worse, *_ = differences("wikitext", pages[1], pages[0])
    low, high = np.quantile(second - first, [0.025, 0.975])
    assert worse.low == pytest.approx(low, abs=0.1 * (high - low))
    assert worse.high == pytest.approx(high, abs=0.1 * (high - low))


def test_differences_are_paired_and_positive_where_worse():
    better = [{"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}] * 10
    worse = [{"exact_match,strict-match": float(at > 4), "exact_match,flexible-extract": 1.0} for at in range(10)]
    strict, flexible = differences("gsm8k", worse, better)
    assert (strict.worse_by, flexible.worse_by) == (0.5, 0.0)
    assert strict.low < 0.5 < strict.high
    low, high = ([{"loss_sum": nats, "tokens": 2} for _ in range(5)] for nats in (1.0, 3.0))
    (loss,) = differences("heldout", high, low)
    assert (loss.worse_by, loss.low, loss.interval) == (1.0, None, "none")  # no spread, nothing to estimate it from


def test_a_model_that_gives_one_answer_is_told():
    assert single_answer({}) is None
    assert single_answer({"A": 94, "B": 6}) is None
    assert single_answer({"A": 1, "D": 199}) == "D to 199 of 200 items"


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="loss is nan; expected a finite number"):
        summarise("heldout", [{"loss_sum": math.nan, "tokens": 2}] * 3)


# --- the command


def test_evaluate_forget_and_show(run, model_folder, benchmark_data, adapter, data_file, tmp_path):
    tasks = "mmlu,gsm8k,wikitext,heldout"
    more = ("--eval-data", data_file, "--limit", 5)
    out, _ = evaluation(run, model_folder, benchmark_data, "base", *more, tasks=tasks)
    assert "word_perplexity" in out
    out, _ = evaluation(
        run, model_folder, benchmark_data, "tuned", *more, "--adapter", adapter, "--against", "base", tasks=tasks
    )
    assert "Forgetting: tuned against base" in out
    table = pyarrow.parquet.read_table(tmp_path / "tuned" / "items.parquet").to_pylist()
    assert [sum(row["task"] == task for row in table) for task in tasks.split(",")] == [5, 5, 5, 5]
    assert {row["subject"] for row in table if row["task"] == "mmlu"} == set(SUBJECTS)
    assert not (tmp_path / "tuned" / JOURNAL_FILE).exists()
    found = json.loads((tmp_path / "tuned" / "eval.json").read_text())
    assert found["format"] == "aletheia-evaluation"
    assert [task["version"] for task in found["tasks"]] == ["2 (subjects 1.0)", "3.0", "2.0", "1"]
    assert found["settings"]["adapter_sha256"]
    assert sum(found["tasks"][0]["answers"].values()) == 5
    assert found["tasks"][1]["answers"] == {}
    assert found["packages"]["lm-eval"]

    code, out, err = run("eval", "--out", "tuned", "--against", "base", "--against", "tuned", "--json")
    assert code == 0, err
    forgetting, extra = json.loads(out)["against"]
    assert (forgetting["kind"], extra["kind"]) == ("forgetting", "extra forgetting")
    losses = {row["task"]: row for row in table}
    assert losses["heldout"]["loss_sum"] > 0
    assert forgetting["tasks"]["heldout"][0]["worse_by"] != 0
    assert extra["tasks"]["heldout"][0]["worse_by"] == 0

    _, err = evaluation(run, model_folder, benchmark_data, "tuned", *more, "--adapter", adapter, tasks=tasks)
    assert "finished evaluation with these settings" in err
    assert "load" not in err


def test_a_killed_evaluation_goes_on_to_the_same_rows(run, model_folder, benchmark_data, tmp_path):
    evaluation(run, model_folder, benchmark_data, "whole", "--batch-size", 1)
    slow = (
        "import time\nfrom aletheia.lab.evaluation.journal import Journal\nfrom aletheia.cli.main import main\n"
        "add = Journal.add\nJournal.add = lambda *given: (add(*given), time.sleep(0.3))\nmain()\n"
    )
    command = ["eval", model_folder, "--tasks", "mmlu,gsm8k,wikitext", "--out", "killed"]
    command += ["--data-dir", benchmark_data, *QUICK, "--batch-size", "1"]
    process = forked.Forked(slow, command, tmp_path, os.environ, os.devnull, os.devnull)
    journal = tmp_path / "killed" / JOURNAL_FILE
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes()
    assert 5 < done.count(b"\n") < 32
    journal.write_bytes(done + b'{"task": "mmlu", "at": 2')  # a line that was cut off
    code, _, err = run("eval", model_folder, "--data-dir", benchmark_data, "--out", "killed", "--limit", 3)
    assert code == 2
    assert "interrupted (settings: " in err
    evaluation(run, model_folder, benchmark_data, "killed", "--batch-size", 1)
    whole, killed = (
        pyarrow.parquet.read_table(tmp_path / name / "items.parquet").to_pylist() for name in ("whole", "killed")
    )
    assert killed == whole
    assert not journal.exists()


def test_answers_that_are_there_are_not_computed_again(base, benchmark_data, tmp_path, monkeypatch):
    settings = aletheia.eval_settings(benchmark_data, None, model="tiny", tasks=["mmlu"], batch_size=4)
    answer, asked = Benchmark.answer, []
    monkeypatch.setattr(Benchmark, "answer", lambda work, batch: asked.append(batch) or answer(work, batch))
    monkeypatch.setattr(Benchmark, "rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aletheia.evaluate(base, settings, tmp_path, benchmark_data, show_progress=False)
    assert sum(map(len, asked)) == 21
    monkeypatch.undo()
    monkeypatch.setattr(Benchmark, "answer", lambda *_: 1 / 0)
    done = aletheia.evaluate(base, settings, tmp_path, benchmark_data, show_progress=False)
    assert len(done.rows["mmlu"]) == 21


def test_humaneval_is_scored_program_by_program(
    run,
    model_folder,
    benchmark_data,
    tmp_path,
    monkeypatch,
):
    arguments = ("eval", model_folder, "--tasks", "humaneval", "--data-dir", benchmark_data, "--out", "code", *QUICK)
    sandbox.check.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap: said before anything is generated
    code, _, err = run(*arguments)
    assert code == 2
    assert "--unsafe-exec" in as_flags(err)
    assert not (tmp_path / "code" / JOURNAL_FILE).exists()
    seen = []

    def score(programs, unsafe):
        seen.append((programs, unsafe))
        return [SimpleNamespace(passed=at != 1) for at in range(4)]

    monkeypatch.setattr(humaneval, "score", score)
    monkeypatch.setattr(humaneval, "humaneval_program", lambda *parts: parts)
    code, out, err = run(*arguments, "--unsafe-exec", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"][0]["metrics"][0]["value"] == 0.75
    ((programs, unsafe),) = seen
    assert unsafe
    rows = pyarrow.parquet.read_table(tmp_path / "code" / "items.parquet").to_pylist()
    assert [row["pass@1"] for row in rows] == [1, 0, 1, 1]
    for at, (task, prompt, completion, _, entry_point) in enumerate(programs):
        assert (task, prompt, entry_point) == (f"HumanEval/{at}", f"def add_{at}(a):\n", f"add_{at}")
        assert completion == rows[at]["prediction"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "mmlu,arc"), "unknown task 'arc' in --tasks; expected some of mmlu,gsm8k"),
        (("--tasks", "mmlu,mmlu"), "--tasks names a task twice"),
        (("--tasks", "heldout"), "heldout and --eval-data belong together"),
        (("--tasks", "mmlu", "--limit", 0), "--limit is 0; expected at least 1"),
        (("--tasks", "gsm8k", "--num-fewshot", 50), "gsm8k has 12 examples for its prompts; expected 50"),
        (("--adapter", "nowhere"), "nowhere holds no adapter"),
        (("--against", "nowhere"), "nowhere holds no finished evaluation"),
    ],
)
def test_bad_arguments_are_one_line(run, model_folder, benchmark_data, arguments, message):
    code, _, err = run("eval", model_folder, "--data-dir", benchmark_data, "--out", "out", *arguments)
    assert code == 2
    assert message in as_flags(err.splitlines()[-1])


def test_bad_data_is_named(benchmark_data, tmp_path):
    with pytest.raises(DataError, match=r"mmlu/test.jsonl: found no such file"):
        local_splits("mmlu", tmp_path)
    write_rows(tmp_path / "mmlu/dev.jsonl", [{}])
    write_rows(tmp_path / "mmlu/test.jsonl", [{"subject": "anatomy", "question": "?", "choices": ["1"], "answer": 0}])
    with pytest.raises(DataError, match=r"test.jsonl:1: expected four choices"):
        local_splits("mmlu", tmp_path)
    write_rows(tmp_path / "gsm8k/test.jsonl", [{"question": "?"}])
    write_rows(tmp_path / "gsm8k/train.jsonl", [{"question": "?", "answer": "1"}])
    with pytest.raises(DataError, match=r"test.jsonl:1: found the columns 'question'; expected 'answer', too"):
        local_splits("gsm8k", tmp_path)


def test_only_the_same_items_are_compared(run, model_folder, benchmark_data):
    evaluation(run, model_folder, benchmark_data, "five", "--limit", 5, tasks="mmlu")
    evaluation(run, model_folder, benchmark_data, "six", "--limit", 6, tasks="mmlu")
    evaluation(run, model_folder, benchmark_data, "shots", "--limit", 5, "--num-fewshot", 1, tasks="mmlu")
    evaluation(run, model_folder, benchmark_data, "texts", "--limit", 2, tasks="wikitext")
    for other, message in (
        ("six", "use the same --limit"),
        ("shots", "5 of 5 items differ"),
        ("texts", "no task in common"),
    ):
        code, _, err = run("eval", "--out", "five", "--against", other)
        assert code == 2
        assert message in as_flags(err)
    code, _, err = run(
        "eval", model_folder, "--data-dir", benchmark_data, "--out", "five", "--tasks", "mmlu", *QUICK, "--limit", 4
    )
    assert code == 2
    assert "five holds another evaluation (limit 4 here, 5 there)" in err


def test_without_lm_eval_the_command_says_what_to_install(run, model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run("eval", model_folder, "--tasks", "mmlu", "--out", "out")
    assert code == 2
    assert "pip install 'aletheia-tune[eval]'" in err


def test_chat_needs_a_template(lm, benchmark_data, monkeypatch):
    tasks = load_tasks("gsm8k", benchmark_data)
    work = Benchmark("gsm8k", tasks, lm, limit=2, chat=True)
    assert work.items[0].requests[0].args[0].startswith("<|im_start|>user\nQuestion:")
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(EvaluationError, match="`chat` needs a chat template"):
        Benchmark("gsm8k", tasks, lm, limit=2, chat=True)


def test_a_journal_belongs_to_one_evaluation(tmp_path):
    Journal(tmp_path, {"model": {"weights": "a"}}).add("mmlu", [3, 1], [0.5, "x"])
    assert Journal(tmp_path, {"model": {"weights": "a"}}).answers == {("mmlu", 3): 0.5, ("mmlu", 1): "x"}
    with pytest.raises(EvaluationError, match=r"interrupted \(model: weights 'b' here, 'a' there\)"):
        Journal(tmp_path, {"model": {"weights": "b"}})


# --- adapters


def test_a_saved_adapter_gives_the_trained_models_logits(base, adapter, model_folder):
    model = aletheia.load(str(model_folder), "float32").model
    ids = torch.arange(20)[None]
    before = model(ids).logits
    adapted = aletheia.load_adapter(model, adapter)
    assert not adapted.training
    assert not torch.allclose(adapted(ids).logits, before)
    with pytest.raises(AdapterError, match="has an adapter already"):
        aletheia.load_adapter(adapted, adapter)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    with pytest.raises(AdapterError, match="does not fit this model: 8 weight"):
        aletheia.load_adapter(make_model("llama", layers=6), adapter)
    with pytest.raises(AdapterError, match="does not fit this model"):
        aletheia.load_adapter(make_model("gpt2"), adapter)
    with pytest.raises(AdapterError, match=r"no adapter_config.json"):
        aletheia.load_adapter(make_model(), tmp_path)


def test_a_run_folder_is_an_adapter(run, model_folder, data_file, tmp_path):
    steps = ("--steps", 2, "--max-length", 128)
    code, _, err = run("train", model_folder, "--data", data_file, "--out", "run", *steps)
    assert code == 0, err
    held_out = json.loads((tmp_path / "run" / "metrics.json").read_text())
    arguments = ("eval", model_folder, "--tasks", "heldout", "--eval-data", data_file, "--out", "e", "--adapter", "run")
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    (loss,) = json.loads(out)["tasks"][0]["metrics"]
    assert loss["items"] == 60
    assert loss["value"] == pytest.approx(held_out["held_out_loss_after"], abs=0.5)
    with pytest.raises(aletheia.errors.PlanError, match="the plan was made for"):
        aletheia.load_adapter(make_model("llama", seed=3), tmp_path / "run")
