"""A run that learned nothing, or did harm, says so in its last line and its exit code."""

import json
import shutil

import pytest
from conftest import count_rows
from safetensors.torch import load_file, save_file

from aletheia.training.learning_rate import warm_up_steps

PLAIN = ("--dtype", "float32", "--cache", "off", "--freeze-after", 0, "--max-length", 64, "--eval-rows", 4)


@pytest.fixture
def few(tmp_path):
    """Three rows to train on, fewer than a batch, and four others."""
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in count_rows(3)))
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in count_rows(4, start=20)))
    return ("--data", "three.jsonl", "--eval-data", "four.jsonl")


def test_fewer_rows_than_a_batch_learn_and_are_noted(run, model_folder, few, tmp_path):
    code, out, err = run("train", model_folder, *few, "--out", "run", *PLAIN, "--json")
    metrics = json.loads(out)
    assert (code, metrics["steps"], metrics["verdict"]) == (0, 1, "learned"), err
    assert "note: 3 rows do not fill a step of 4; each pass over them is one step" in err
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("asked", "steps", "expected"),
    [(0.05, 1, 0), (0.05, 2, 1), (0.05, 40, 2), (0.05, 25, 2), (10, 3, 2), (10, 100, 10), (0, 5, 0), (1, 1, 0)],
)
def test_no_run_is_all_warm_up(asked, steps, expected):
    assert warm_up_steps(asked, steps) == expected


@pytest.mark.parametrize("warm_up", ["0.5", "5", "1"])
def test_the_shortest_run_learns_whatever_the_warm_up(run, model_folder, few, warm_up):
    code, out, _ = run("train", model_folder, *few, "--out", "run", *PLAIN, "--warmup-steps", warm_up, "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "learned")


def test_a_run_that_learned_nothing_says_so(run, model_folder, few, tmp_path):
    nothing = ("--lr-scheduler-type", "constant", "--learning-rate", 1e-300)
    code, _, err = run("train", model_folder, *few, "--out", "run", *PLAIN, *nothing, "--allow-worse")
    assert code == 3
    assert err.splitlines()[-1].startswith("warning: nothing was learned: after")
    assert "--learning-rate" in err.splitlines()[-1]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_run_that_did_harm_says_so_and_may_be_allowed(run, model_folder, data_file, tmp_path):
    sharp = tmp_path / "sharp"  # a model that can be sure of something
    shutil.copytree(model_folder, sharp)
    weights = load_file(sharp / "model.safetensors")
    save_file(
        {name: 20 * value if "embed" in name else value for name, value in weights.items()},
        sharp / "model.safetensors",
        {"format": "pt"},
    )
    options = (*PLAIN, "--learning-rate", 0.05, "--steps", 20)
    assert run("train", sharp, "--data", data_file, *options, "--out", "first")[0] == 0
    others = [{"prompt": f"say red {number} times", "completion": "@%&"} for number in range(8)]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    harm = ("first", "--data", "others.jsonl", "--eval-data", data_file, *options, "--keep", "last")
    code, out, err = run("train", *harm, "--out", "run", "--json")
    metrics = json.loads(out)
    assert (code, metrics["verdict"]) == (3, "worse"), err
    assert metrics["held_out_loss_after"] > metrics["held_out_loss_before"]
    last = err.splitlines()[-1]
    assert last.startswith("warning: the held-out loss rose from ")
    assert "the adapter is kept in run" in last
    assert "--allow-worse" in last
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    code, _, err = run("train", *harm, "--out", "allowed", "--allow-worse")
    assert code == 0
    assert err.splitlines()[-1].startswith("note: the held-out loss rose from ")


def test_a_rate_beyond_all_bounds_never_passes(run, model_folder, data_file):
    code, _, err = run("train", model_folder, "--data", data_file, *PLAIN, "--learning-rate", 1e20, "--out", "run")
    assert code in (2, 3)
    assert err.splitlines()[-1].startswith(("warning: the held-out loss rose", "error: "))
    assert "Traceback" not in err


def test_going_on_with_an_adapter_that_stays_as_it_was_is_nothing(run, model_folder, few, tmp_path):
    options = (*few, *PLAIN, "--steps", 4)
    assert run("train", model_folder, *options, "--out", "first", "--allow-worse")[0] == 0
    code, _, err = run("train", "first", *options, "--learning-rate", 1e-300, "--out", "second")
    assert code == 3
    assert err.splitlines()[-1].startswith("warning: nothing was learned")


def test_many_passes_over_few_rows_are_no_setting_of_anybody(run, model_folder, few):
    code, _, err = run(
        "train", model_folder, *few, "--steps", 2, "--batch-size", 10**6, "--freeze-after", 0, "--out", "run"
    )
    assert code in (0, 3), err
