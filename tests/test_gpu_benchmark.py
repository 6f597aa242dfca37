"""The benchmarks still start, and every arm of the one for a GPU runs on tiny models, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMPORT_ALL = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    try:
        importlib.import_module(path.stem)
    except ModuleNotFoundError as error:  # a package that only this benchmark needs
        if error.name not in ("aletheia_lora", "trl", "unsloth"):
            raise
"""
REFUSED = {  # arms that cannot run here, and why
    "every-layer-compiled": "experts, which cannot be compiled",
    "upper-half-compiled": "experts, which cannot be compiled",
    "every-layer-graphs": "expected a GPU",
    "upper-half-graphs": "expected a GPU",
    "predicted-graphs": "expected a GPU",
    "upper-half-nf4": "other results in training than in evaluation",  # bitsandbytes, on a processor
    "unsloth": "No module named 'unsloth'",
    "unsloth-kept": "No module named 'unsloth'",
}


def python(*words):
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-2000:]


def arms_of(folder, *options):
    python(BENCHMARKS / "gpu.py", "--out", folder, "--device", "cpu", "--tiny", "--steps", 4, *options)
    return json.loads((folder / "gpu.json").read_text())["arms"]


def test_every_benchmark_finds_what_it_imports():
    done = forked.run(IMPORT_ALL, [BENCHMARKS], BENCHMARKS, os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_steps_on_a_gpu_are_measured_as_the_product_takes_them(tmp_path):
    arms = arms_of(tmp_path, "--models", "8b", "--arms", "plain,every-layer,upper-half,cached-alone")
    assert [len(arm["step_seconds"]) for arm in arms] == [4, 4, 1, 4, 4]  # the first epoch warms up for three
    assert len({sum(arm["tokens"]) for arm in arms if len(arm["tokens"]) == 4}) == 1  # the same rows
    notes = " ".join(note for arm in arms for note in arm["notes"])
    assert "recomputation" not in notes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["8b", "1.5b", "mixture"])
def test_every_arm_runs(tmp_path, model):
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    arms = arms_of(tmp_path, "--models", model, "--seconds", 3600)
    failed = {arm["arm"]: arm["failed"] for arm in arms if "failed" in arm}
    unexpected = {name: reason for name, reason in failed.items() if REFUSED.get(name, "?") not in reason}
    assert not unexpected
    assert sum("step_seconds" in arm for arm in arms) > 20
