"""The command line as a user meets it: every command end to end on a tiny model, and every bad input."""

import json
import subprocess
import sys

import pytest
from test_formats import overflowing
from tiny import edited, make_tokenizer

from aletheia.prefix.cache import DiskCache
from aletheia.prefix.cache_folders import stored_caches
from aletheia.probing.scores import Scores

COMMANDS = ("inspect", "probe", "plan", "show", "train", "eval", "report", "cache", "demo", "doctor")


@pytest.fixture
def scores_file(run, model_folder, data_file, tmp_path):
    steps = ("--batches", 2, "--no-calibrate")
    assert run("probe", model_folder, "--data", data_file, "--out", "scores.json", *steps)[0] == 0
    return tmp_path / "scores.json"


def test_a_streamed_probe_writes_the_same_scores(run, model_folder, data_file, scores_file, tmp_path):
    steps = ("--batches", 2, "--stream", "--max-memory", "2GB")
    code, _, err = run("probe", model_folder, "--data", data_file, "--out", "streamed.json", *steps)
    assert code == 0, err
    one, other = Scores.read(scores_file), Scores.read(tmp_path / "streamed.json")
    assert other.model == one.model
    assert other.layers == pytest.approx(one.layers, rel=1e-5)
    assert not (tmp_path / "streamed.json.partial").exists()
    assert run("plan", "streamed.json", "--out", "plan.json")[0] == 0


def test_an_overflowing_float16_model_is_probed_another_way(run, data_file, tmp_path):
    overflowing().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    steps = ("--batches", 2, "--no-calibrate", "--dtype", "float16", "--attention", "eager")
    code, _, err = run("probe", "base", "--data", data_file, "--out", "scores.json", *steps)
    assert code == 0, err
    assert "layer 2 (gpt_neox.layers.2) gives values that are not finite" in err
    code, _, err = run("train", "base", "--data", data_file, "--out", "run", *SMALL, *steps[3:])
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out_loss_after"] > 0


def test_weights_too_large_are_streamed(run, model_folder, data_file, monkeypatch):
    code, _, err = run("probe", model_folder, "--data", data_file, "--out", "s.json", "--max-memory", "10kB")
    assert code != 0
    assert "layer by layer" in err
    assert "for one layer and its activations" in err


def test_a_plan_has_to_fit_in_memory(run, model_folder, data_file, scores_file):
    plan = ("plan", scores_file, "--out", "plan.json", "--freeze-after", 0)  # so that it can be streamed, too
    assert run(*plan)[0] == 0
    asked = ("train", model_folder, "--data", data_file, "--out", "run", "--plan", "plan.json", *SMALL)
    for more in ((), ("--stream",)):
        code, _, err = run(*asked, *more, "--overwrite", "--max-memory", "1GB")
        assert code == 2
        assert "--max-memory is 1.0 GB; the plan takes up to 1.2 GB with batches of" in err.splitlines()[-1]
        code, _, err = run(*asked, *more, "--overwrite", "--max-memory", "2GB")
        assert code == 0, err


SMALL = ("--steps", 4, "--learning-rate", 0.01, "--max-length", 128)


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom aletheia.cli import main\nsys.argv = ['aletheia', '--help']\n"
        "try: main.main()\nexcept SystemExit as end: assert not end.code\n"
        "print('loaded', {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("loaded set()")
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_that_is_valid(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    example = out.split("Example:")[1].strip().splitlines()[0].strip()
    assert example.startswith(f"aletheia {command}")
    options = {word for word in example.split() if word.startswith("--")}
    assert all(option in out.split("Example:")[0] for option in options)


def test_the_steps_one_by_one(run, scores_file, model_folder, data_file, tmp_path):
    code, out, err = run("plan", scores_file, "--out", "plan.json", "--policy", "top-percent")
    assert code == 0, err
    assert "top-percent" in out
    train = ("train", model_folder, "--data", data_file, "--plan", "plan.json", *SMALL)
    assert run(*train, "--out", "runs/plan")[0] == 0
    run("plan", scores_file, "--out", "uniform.json", "--policy", "uniform")
    code, out, err = run(*train, "--plan", "uniform.json", "--out", "runs/uniform", "--json")
    assert code == 0, err
    assert json.loads(out)["boundary"] == 0
    assert run("report", "runs/uniform", "runs/plan", "--out", "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "top-percent" in page
    assert "Not like for like" not in page
    for shown in ("scores.json", "plan.json", "runs/plan", "runs/plan/metrics.json"):
        code, out, _ = run("show", shown)
        assert code == 0
        assert len(out.splitlines()) > 5
        code, out, _ = run("show", shown, "--json")
        assert json.loads(out)["model"]["name"] == str(model_folder)


def test_the_whole_job_in_one_command(run, model_folder, data_file, tmp_path):
    code, out, err = run("train", model_folder, "--data", data_file, "--out", "run", *SMALL, "--json")
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["steps"] == 4
    assert metrics["seconds"]["probe"] > 0
    assert metrics["held_out_rows"] == 3  # 5 % of 60
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "adapter_model.safetensors", "plan.json", "scores.json", "metrics.json", "report.html", "README.md",
    }  # fmt: skip
    code, _, err = run("train", model_folder, "--data", data_file, "--out", "run", *SMALL)
    assert code == 2
    assert err.strip() == "error: run holds a finished run; choose another --out, or replace it with --overwrite"
    again = ("train", "--config", "run/config.yaml", "--out", "run", "--overwrite", "--json")
    code, out, err = run(*again)
    assert code == 0, err
    assert json.loads(out)["train_curve"][-1]["loss"] == metrics["train_curve"][-1]["loss"]


def test_rows_that_are_cut_or_left_out_are_told(run, model_folder, tmp_path):
    rows = [
        ("what is this", "a word " * 90),
        *[("what is this " * 90, "a word")] * 2,
        *[("what is this", "a word")] * 9,
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    lengths = ("--max-length", 60, "--skip-emptied")
    code, out, err = run("train", model_folder, "--data", "rows.jsonl", "--out", "run", *SMALL[:4], *lengths, "--json")
    assert code == 0, err
    metrics = json.loads(out)
    assert (metrics["rows_truncated"], metrics["rows_skipped"]) == (1, 2)
    assert "note: 1 of 10 rows is cut to 60 tokens (--max-length)" in err
    assert "note: 2 rows are left out: 2 with no token to learn within --max-length" in err


def test_layers_below_learn_at_first(run, model_folder, data_file, tmp_path):
    train = ("train", model_folder, "--data", data_file, *SMALL, "--json")
    default, plain = (
        json.loads(run(*train, "--out", out, *more)[1])
        for out, more in (("default", ("--target", "speed")), ("plain", ("--freeze-after", 0)))
    )
    assert default["early_steps"] == 1
    assert plain["early_steps"] == 0
    assert default["trainable_parameters"] > plain["trainable_parameters"]
    assert default["boundary"] == plain["boundary"] > 0
    code, out, _ = run("show", "default/plan.json")
    assert "first 25 % of the steps" in out
    assert "learn in the first 1 steps, then freeze" in (tmp_path / "default" / "report.html").read_text()
    code, _, err = run(*train, "--out", "x", "--plan", "default/plan.json", "--freeze-after", 0.5)
    assert code == 2
    assert "expected the plan file alone" in err


def test_a_model_that_does_not_fit_is_trained(run, model_folder, data_file, tmp_path, monkeypatch):
    """Streamed, the cache and the suffix give the run that the whole model gives."""
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path / "cache"))
    train = ("train", model_folder, "--data", data_file, *SMALL, "--json")
    code, out, err = run(*train, "--out", "streamed", "--stream")
    assert code == 0, err
    one, other = json.loads(out), json.loads(run(*train, "--out", "whole", "--freeze-after", 0)[1])
    assert one["held_out_loss_after"] == pytest.approx(other["held_out_loss_after"], rel=1e-5)
    assert one["cache_reason"] == "filled layer by layer"
    code, _, err = run(*train, "--out", "again", "--stream", "--plan", "streamed/plan.json")
    assert code == 0, err
    run(*train, "--out", "early", "--freeze-after", 0.5)
    code, _, err = run(*train, "--out", "no", "--stream", "--plan", "early/plan.json")
    assert code == 2
    assert "expected a plan made with --freeze-after 0" in err


def test_an_estimate_on_paper(run, scores_file):
    code, out, err = run("plan", scores_file, "--estimate", "--rows", 1000, "--tokens-per-row", 64)
    assert code == 0, err
    assert "1,000 rows of 64 tokens" in out
    assert out.count("training") == 3
    found = json.loads(run("plan", scores_file, "--estimate", "--json")[1])
    assert [phase["name"] for phase in found["laptop, 16 GB"]] == ["probe", "cache", "training"]
    assert run("plan", scores_file, "--estimate", "--rows", 0)[0] == 2


def test_eval_data_is_used_from_its_beginning(run, model_folder, data_file):
    train = ("train", model_folder, "--data", data_file, "--eval-data", data_file, "--eval-rows", 7, *SMALL)
    code, out, err = run(*train, "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["held_out_rows"] == 7


def test_inspect_counts_parameters_and_flops(run, model_folder):
    code, out, _ = run("inspect", model_folder)
    assert code == 0
    assert "4 decoder layers at model.layers" in out
    assert "self_attn.q_proj" in out
    found = json.loads(run("inspect", model_folder, "--json")[1])
    assert found["modules"][0]["flops_per_token"] == 2 * found["modules"][0]["parameters"] == 2 * 32 * 32


def test_frontier_marks_the_plan(run, model_folder, data_file, tmp_path):
    scores_file = tmp_path / "measured.json"
    assert run("probe", model_folder, "--data", data_file, "--out", scores_file, "--batches", 2)[0] == 0
    code, out, _ = run("plan", scores_file, "--frontier")
    assert code == 0
    assert sum(line.startswith(">") for line in out.splitlines()) == 1
    points = json.loads(run("plan", scores_file, "--frontier", "--json")[1])
    assert points[-1]["relative_step_time"] == points[-1]["relative_cached_step_time"]
    assert "in seconds, from measured parts" in " ".join(out.split())


def test_doctor_tells_what_works(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "float32: works" in out
    found = json.loads(run("doctor", "--json")[1])
    assert found["missing"] == []
    assert found["auto_dtype"] in found["dtypes"]


def test_version_and_no_arguments(run):
    assert run("--version")[1].startswith("aletheia ")
    assert run()[0] == 2


BAD = {
    "missing data": (("probe", "{model}", "--data", "absent.jsonl", "--out", "s.json"), "absent.jsonl"),
    "empty data": (("probe", "{model}", "--data", "empty.jsonl", "--out", "s.json"), "empty.jsonl"),
    "unknown columns": (("probe", "{model}", "--data", "columns.jsonl", "--out", "s.json"), "columns.jsonl:1"),
    "truncated JSON": (("train", "{model}", "--data", "torn.jsonl", "--out", "r"), "torn.jsonl:2"),
    "emptied rows": (("train", "{model}", "--data", "{data}", "--out", "r", "--max-length", "20"), "--skip-unusable"),
    "wrong model": (("train", "absent/folder/x", "--data", "{data}", "--out", "r"), "no folder absent/folder/x"),
    "unknown model": (("inspect", "nobody/nothing"), "cannot load nobody/nothing"),
    "other plan": (("train", "{model}", "--data", "{data}", "--out", "r", "--plan", "other.json"), "{model}"),
    "no plan": (("train", "{model}", "--data", "{data}", "--out", "r", "--plan", "absent.json"), "absent.json"),
    "percent 0": (("plan", "{scores}", "--out", "p.json", "--percent", "0"), "--percent is 0"),
    "percent 101": (("plan", "{scores}", "--out", "p.json", "--percent", "101"), "--percent is 101"),
    "rank 0": (("plan", "{scores}", "--out", "p.json", "--rank", "0"), "--rank is 0"),
    "text rank": (("plan", "{scores}", "--out", "p.json", "--rank", "x"), "--rank"),
    "no output": (
        (
            "plan",
            "{scores}",
        ),
        "--frontier",
    ),
    "policy": (("plan", "{scores}", "--out", "p.json", "--policy", "best"), "is 'best'; expected one of depth-aware"),
    "score": (("probe", "{model}", "--data", "{data}", "--out", "s.json", "--score", "x"), "expected gradient-norm"),
    "not scores": (("plan", "other.json", "--out", "p.json"), "other.json is a plan; expected a scores file"),
    "full folder": (("train", "{model}", "--data", "{data}", "--out", "full"), "full holds other files"),
    "both lengths": (
        ("train", "{model}", "--data", "{data}", "--out", "r", "--steps", 1, "--epochs", 1),
        "one of them",
    ),
    "eval fraction": (("train", "{model}", "--data", "{data}", "--out", "r", "--eval-fraction", 2), "fraction"),
    "eval rows": (("train", "{model}", "--data", "{data}", "--out", "r", "--eval-rows", 0), "--eval-rows"),
    "eval fraction 0": (("train", "{model}", "--data", "{data}", "--out", "r", "--eval-fraction", 0), "fraction"),
    "seed": (("train", "{model}", "--data", "{data}", "--out", "r", "--seed", -1), "--seed"),
    "unwritable": (("train", "{model}", "--data", "{data}", "--out", "/proc/none/r"), "cannot write /proc/none/r"),
    "unwritable scores": (("probe", "{model}", "--data", "{data}", "--out", "/proc/none/s.json"), "cannot write"),
    "steps 0": (("train", "{model}", "--data", "{data}", "--out", "r", "--steps", 0), "--steps is 0"),
    "no run": (("report", "full", "--out", "x.html"), "holds no finished run"),
    "not ours": (("show", "empty.jsonl"), "empty.jsonl holds rows of data; expected a scores file"),
    "nothing there": (("show", "absent.json"), "there is no absent.json"),
    "no such cache": (("cache", "--cache-dir", "caches", "--delete", "abc"), "0 caches in caches begin with 'abc'"),
    "recompute": (
        ("train", "{model}", "--data", "{data}", "--out", "r", "--gradient-checkpointing", "some"),
        "expected one of off, selective, full",
    ),
    "streamed and quantized": (
        ("train", "{model}", "--data", "{data}", "--out", "r", "--stream", "--quantize", "nf4"),
        "give a model that is stored quantized",
    ),
    "streamed without a cache": (
        ("train", "{model}", "--data", "{data}", "--out", "r", "--stream", "--cache", "off"),
        "expected auto or disk",
    ),
    "no memory": (("probe", "{model}", "--data", "{data}", "--out", "s.json", "--max-memory", "much"), "such as 6GB"),
    "bad quantization": (("train", "{model}", "--data", "{data}", "--out", "r", "--quantize", "int3"), "nf4, int8"),
    "bad dtype": (("probe", "{model}", "--data", "{data}", "--out", "s.json", "--dtype", "int3"), "'int3'"),
    "no such command": (("tune",), "tune"),
    "no such option": (("doctor", "--fast"), "--fast"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(run, scores_file, model_folder, data_file, tmp_path, case):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"query": "a", "reply": "b"}\n')
    (tmp_path / "torn.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "ans')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    run("plan", scores_file, "--out", "other.json")
    edited(tmp_path / "other.json", model={"name": "another-model", "fingerprint": "0" * 64})
    arguments, expected = BAD[case]
    places = {"model": model_folder, "data": data_file, "scores": scores_file}
    code, out, err = run(*(str(argument).format(**places) for argument in arguments))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert expected.format(**places) in lines[0]
    if case == "other plan":
        assert "another-model (000000000000)" in lines[0]
    assert not (tmp_path / "r").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_caches_are_listed_and_deleted(run, scores_file, model_folder, data_file, tmp_path):
    for top in (50, 25):
        run("plan", scores_file, "--policy", "last", "--percent", top, "--out", "plan.json")
        places = ("--plan", "plan.json", "--cache", "disk", "--cache-dir", "caches", "--out", f"run-{top}")
        assert run("train", model_folder, "--data", data_file, *SMALL, *places)[0] == 0
    code, out, _ = run("cache", "--cache-dir", "caches", "--json")
    assert code == 0
    found = json.loads(out)
    assert [one["boundary"] for one in found] == [3, 2]  # the one used last comes first
    assert found[0]["size_bytes"] > json.loads((tmp_path / "run-25" / "metrics.json").read_text())["cache_bytes"] > 0
    delete = ("cache", "--cache-dir", "caches", "--delete", found[0]["key"][:8])
    held = DiskCache("caches", stored_caches("caches")[0].info)  # as by a run that is under way
    code, _, err = run(*delete)
    assert code == 2
    assert "is in use by a run; expected an unused cache" in err
    held.close()
    assert run(*delete)[0] == 0
    code, out, _ = run("cache", "--cache-dir", "caches")
    assert code == 0
    assert found[1]["key"][:12] in out
    assert found[0]["key"][:12] not in out
    assert run("cache", "--cache-dir", "caches", "--delete-unused", 1)[2] == ""  # used today
    _, out, err = run("cache", "--cache-dir", "caches", "--delete-unused", 0)
    assert out == ""
    assert err.startswith("deleted ")
    assert list((tmp_path / "caches").iterdir()) == []


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_frontier_is_drawn(run, scores_file, tmp_path, suffix):
    picture = tmp_path / f"frontier.{suffix}"
    code, _, err = run("plan", scores_file, "--plot", picture, "--speedup", "1.1", "--epochs", "3")
    assert code == 0
    assert str(picture) in err
    assert picture.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    code, _, err = run("plan", scores_file, "--plot", tmp_path / "frontier.doc")
    assert code == 2
    assert "expected a file that ends with .svg, .png or .pdf" in err
