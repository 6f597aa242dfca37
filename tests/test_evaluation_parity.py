"""The real SmolLM2-135M: our numbers equal those of lm-eval run directly on the same items (make test-slow).

The direct run shares nothing with ours but the files: lm-eval's own loader reads upstream's task files, pointed at
local data, and its own model class loads the weights.
"""

import json
import os
from pathlib import Path

import pytest
import yaml
from test_slow import aletheia_command

import aletheia
from aletheia.anatomy.demo import demo_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'aletheia-tune[eval]'")
pytestmark = pytest.mark.slow
DATA = Path(os.environ.get("ALETHEIA_DATA", "../shared/data")).resolve()
ITEMS = int(os.environ.get("ALETHEIA_PARITY_ITEMS", "200"))
DTYPE = os.environ.get("ALETHEIA_PARITY_DTYPE", "float32")  # bfloat16 is 2-3 times as fast where it is hardware
UPSTREAM = Path(lm_eval.__file__).parent / "tasks"
needs_data = pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason=f"no MMLU in {DATA}; set ALETHEIA_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 as a model folder, which lm-eval can load."""
    path = tmp_path_factory.mktemp("smol")
    base = aletheia.load(str(demo_checkpoint()), DTYPE)
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def task_file(folder: Path, name: str, upstream: str, **files: list[dict]) -> None:
    """Upstream's task on local json files, as lm-eval's documentation does it."""
    for split, rows in files.items():
        (folder / f"{name}-{split}.json").write_text(json.dumps(rows))
    config = {"include": str(UPSTREAM / upstream), "task": name, "tag": None, "dataset_path": "json"}
    data_files = {split: str(folder / f"{name}-{split}.json") for split in files}
    config |= {"dataset_name": None, "dataset_kwargs": {"data_files": data_files}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def direct(folder: Path, tasks: Path, samples: dict[str, list[int]], **arguments) -> dict:
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": DTYPE, "softmax_dtype": "float32"},
        tasks=sorted(samples),
        samples=samples,
        batch_size=8,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **arguments,
    )


def ours(folder: Path, out: Path, task: str, *arguments: object) -> aletheia.Evaluated:
    aletheia_command(
        "eval", folder, "--tasks", task, "--limit", ITEMS, "--data-dir", DATA, "--out", out, "--dtype", DTYPE,
        *arguments,
    )  # fmt: skip
    return aletheia.Evaluated.read(out)


@needs_data
def test_mmlu_equals_a_direct_run(folder, tmp_path):
    found = ours(folder, tmp_path / "eval", "mmlu")
    rows, samples = found.rows["mmlu"], {}
    for row in rows:
        samples.setdefault(f"mmlu_{row['subject']}", []).append(row["item"])
    tests, examples = rows_of(DATA / "mmlu/test.jsonl"), rows_of(DATA / "mmlu/dev.jsonl")
    for name in samples:
        subject = name.removeprefix("mmlu_")
        parts = {"test": tests, "dev": examples}
        parts = {split: [row for row in some if row["subject"] == subject] for split, some in parts.items()}
        task_file(tmp_path, name, f"mmlu/default/{name}.yaml", **parts)
    results = direct(folder, tmp_path, samples)
    expected = {
        (name.removeprefix("mmlu_"), sample["doc_id"]): (sample["acc"], [nats for ((nats, _),) in sample["resps"]])
        for name, some in results["samples"].items()
        for sample in some
    }
    assert {(row["subject"], row["item"]): (row["acc"], row["loglikelihoods"]) for row in rows} == expected
    accuracy = sum(score for score, _ in expected.values()) / len(expected)
    print(f"MMLU, {len(rows)} items: {found.evaluation.tasks[0].metrics[0].value:.4f}, direct {accuracy:.4f}")
    assert found.evaluation.tasks[0].metrics[0].value == pytest.approx(accuracy)
    versions = set(results["versions"].values())
    assert found.evaluation.tasks[0].version == f"2 (subjects {versions.pop()})"


@needs_data
def test_gsm8k_equals_a_direct_run(folder, tmp_path):
    """Answers of 64 tokens on both sides, to spare half of the time."""
    found = ours(folder, tmp_path / "eval", "gsm8k", "--max-new-tokens", 64)
    rows = found.rows["gsm8k"]
    files = {split: rows_of(DATA / f"gsm8k/{split}.jsonl") for split in ("test", "train")}
    task_file(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", **files)
    results = direct(folder, tmp_path, {"gsm8k": [row["item"] for row in rows]}, gen_kwargs={"max_gen_toks": 64})
    expected = {}
    for sample in results["samples"]["gsm8k"]:
        scores = expected.setdefault(sample["doc_id"], {"prediction": sample["resps"][0][0]})
        scores[f"exact_match,{sample['filter']}"] = sample["exact_match"]
    names = ("prediction", "exact_match,strict-match", "exact_match,flexible-extract")
    assert {row["item"]: {name: row[name] for name in names} for row in rows} == expected
    for metric in found.evaluation.tasks[0].metrics:
        value = results["results"]["gsm8k"][metric.name]
        print(f"GSM8K, {len(rows)} items, {metric.name}: {metric.value:.4f}, direct {value:.4f}")
        assert metric.value == pytest.approx(value)
