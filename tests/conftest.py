"""Offline for all tests, and data of this machine only where a test asks for it."""

import gc
import json
import os
import sys
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"

import jinja2
import pytest
import torch
from hypothesis import settings
from tiny import make_model, make_tokenizer

from aletheia.cli import main as cli
from aletheia.data.encode import load_data

settings.register_profile("any speed", deadline=None)  # tests assert no times
settings.load_profile("any speed")
WORDS = ["red", "blue", "green", "one", "two", "three", "four", "five", "six", "seven"]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage in what is imported here: each run of Trainer asks for it, and it takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def kinds_of_steps_timed_once():
    """Calibration repeats short steps for a fifth of a second; here their times matter to no test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("aletheia.training.timed.SHORT_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def cards_compiled_once():
    """PEFT writes a card with each adapter it saves, and compiles the same template for each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jinja2.Template", cache(jinja2.Template))
        yield


def count_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """A task that a tiny model learns in seconds: repeat a word."""
    return [
        {"question": f"say {WORDS[i % len(WORDS)]} {i % 7 + 1} times", "answer": WORDS[i % len(WORDS)]}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """A small question-answer file."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in count_rows(60)))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    """The byte-level tokenizer with a chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def examples(data_file, tokenizer):
    """The file, tokenised."""
    return load_data(str(data_file), tokenizer, max_length=128)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny Llama with its tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def device():
    """Where tests marked ``gpu`` run; ``ALETHEIA_GPU_TESTS_ON=cpu`` tries the tests themselves on a processor."""
    chosen = torch.device(os.environ.get("ALETHEIA_GPU_TESTS_ON", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return chosen


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call ``aletheia`` in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aletheia", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call
