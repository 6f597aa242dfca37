"""Two processes learn what one does: DDP and FSDP2 on processors, attached to Trainer and by ``aletheia train``."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from one_of_several import attach
from safetensors.torch import load_file
from tiny import make_model
from torch.utils.data import BatchSampler

import aletheia
from aletheia.prefix import source
from aletheia.prefix.cache import MemoryCache
from aletheia.prefix.source import Group, PrefixSource

WORKER = str(Path(__file__).parent / "one_of_several.py")
STEPS = 24  # of 4 rows: more than two epochs
WAYS = {
    "DDP": {},
    "FSDP2, whole": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    "FSDP2, sharded": {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"},
}
BATCH = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.fixture(scope="module")
def plan_file(examples, tmp_path_factory):
    """Layers 2 and 3 to the end, 0 and 1 for the first quarter of the steps."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    scores = aletheia.probe(make_model(), examples, batches=2)
    aletheia.plan(scores, policy="last", rank=4, freeze_after=0.25).write(path)
    return path


def environment(way, **variables):
    several = {"FSDP_ON_CPU": "1"} if WAYS[way] else {}
    code = str(Path(aletheia.__file__).parents[1])  # as imported here, whatever folder a test is in
    own = {"PYTHONPATH": code, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
    return os.environ | own | several | variables


def launch(way, *arguments, **variables):
    """Two processes of one_of_several.py under torchrun, and when they ended."""
    command = [sys.executable, *TORCHRUN, WORKER, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(way, **variables), capture_output=True, text=True, timeout=300, check=False
    )
    return done, time.time()


def launch_by_fork(*arguments):
    """The same without torchrun: its variables for two processes of DDP that begin at once; their errors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(2)]
        ranks = [
            forked.Forked(
                f"import runpy; runpy.run_path({WORKER!r}, run_name='__main__')",
                arguments, folder, environment("DDP", RANK=str(rank), LOCAL_RANK=str(rank), **told), log, log,
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
        return [log.read_text() for rank, log in zip(ranks, logs, strict=True) if rank.wait(timeout=300)]


def job(out, plan_file, data_file, way="DDP", processes=2, **more):
    """What one_of_several.py is told to attach."""
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "no",
        "adam_epsilon": 1e-4,  # or Adam takes a whole step along a gradient that is nothing but rounding
    } | more.pop("arguments", {})
    places = {"out": str(out), "plan": str(plan_file), "data": str(data_file), "cache_dir": str(out / "cache")}
    return places | {"rows": 40, "fsdp": WAYS[way], "arguments": arguments} | more


def largest_difference(found, expected):
    """Of all adapters, relative to each."""
    assert found.keys() == expected.keys()
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def of_ranks(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


slow = pytest.mark.slow


@pytest.mark.parametrize("way", ["DDP", *(pytest.param(way, marks=slow) for way in list(WAYS)[1:])])
def test_an_attached_trainer_learns_as_in_one_process(way, plan_file, data_file, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    attach(job(alone, plan_file, data_file, processes=1))
    told = json.dumps(job(both, plan_file, data_file, way))
    if way == "DDP":
        assert launch_by_fork("attach", told) == []
    else:
        done, _ = launch(way, "attach", told)
        assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads((alone / "rank-0.json").read_text())
    assert largest_difference(load_file(both / "whole.safetensors"), load_file(alone / "whole.safetensors")) < 1e-5
    for told in of_ranks(both):
        assert told["cache"] == "disk"
        assert told["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert told["held_out"] == pytest.approx(expected["held_out"], rel=1e-5)
    one, other = of_ranks(both)
    assert len(one["stored"]) + len(other["stored"]) == 48  # 40 rows to train on and 8 held-out ones, each once
    assert len({*one["stored"], *other["stored"]}) == 48
    if way == "DDP":  # a process of FSDP2 runs along where the other one computes
        assert (one["computed"], other["computed"]) == (one["stored"], other["stored"])


@slow
def test_a_cache_in_memory_is_of_each_process(plan_file, data_file, tmp_path):
    done, _ = launch("DDP", "attach", json.dumps(job(tmp_path, plan_file, data_file, cache="memory")))
    assert done.returncode == 0, done.stderr[-3000:]
    computed = [set(told["computed"]) for told in of_ranks(tmp_path)]
    assert computed[0] & computed[1]  # dealt to the other process in a later epoch
    assert all(told["cache"] == "memory" for told in of_ranks(tmp_path))


@slow
def test_the_file_for_accelerate_launch_gives_fsdp2(plan_file, data_file, tmp_path):
    """The worker asserts that it runs under FSDP2, which only the file says."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    attach(job(alone, plan_file, data_file, processes=1))
    file = Path(__file__).parent.parent / "examples" / "accelerate_fsdp2.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    command = [sys.executable, *launcher, "--main_process_port", "0", WORKER, "attach"]
    command.append(json.dumps(job(both, plan_file, data_file)))
    done = subprocess.run(
        command, env=environment("FSDP2, sharded"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(load_file(both / "whole.safetensors"), load_file(alone / "whole.safetensors")) < 1e-5


@slow
@pytest.mark.parametrize("way", list(WAYS)[:2])
def test_two_launchers_with_a_cache_each_learn_as_one_process(way, plan_file, data_file, tmp_path):
    """As on two machines with disks of their own: one process each, which finds nothing of the other's."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    attach(job(alone, plan_file, data_file, processes=1))
    own = {"cache_dir": str(tmp_path / "cache-{GROUP_RANK}")}
    told = json.dumps(job(both, plan_file, data_file, way) | own)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    head = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *head, WORKER, "attach", told]
    machines = [subprocess.Popen(command, env=environment(way), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for machine in machines:
        _, errors = machine.communicate(timeout=300)
        assert machine.returncode == 0, errors[-3000:]
    assert largest_difference(load_file(both / "whole.safetensors"), load_file(alone / "whole.safetensors")) < 1e-5
    one, other = of_ranks(both)
    assert set(one["stored"]) & set(other["stored"])
    assert not list(tmp_path.glob("cache-*/*"))  # of this run alone, so deleted on both


@slow
@pytest.mark.parametrize("way", WAYS)
def test_an_attached_trainer_resumes_with_the_frozen_adapters_of_its_checkpoint(way, plan_file, data_file, tmp_path):
    saving = {"arguments": {"save_strategy": "steps", "save_steps": 10}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done, _ = launch(way, "attach", json.dumps(job(whole, plan_file, data_file, way, **saving)))
    assert done.returncode == 0, done.stderr[-3000:]
    ended = {"ENDED": str(tmp_path / "ended")}
    done, _ = launch(way, "attach", json.dumps(job(cut, plan_file, data_file, way, dies_after=13, **saving)), **ended)
    assert done.returncode != 0
    assert not (cut / "checkpoint-20").exists()
    done, _ = launch(way, "attach", json.dumps(job(cut, plan_file, data_file, way, resume=True, **saving)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert of_ranks(cut)[0]["losses"] == of_ranks(whole)[0]["losses"]
    assert largest_difference(load_file(cut / "whole.safetensors"), load_file(whole / "whole.safetensors")) == 0


@pytest.fixture(scope="module")
def arguments_of(model_folder, data_file, tmp_path_factory):
    """Makes the arguments of ``aletheia train`` for a way, a batch size and a run folder."""
    folder = tmp_path_factory.mktemp("configs")

    def make(out, way="DDP", **training):
        ours = {"batch_size": 2, "steps": STEPS, "evaluations": 3, "learning_rate": 5e-3, "cache_dir": str(folder)}
        sharded = {"fsdp": True, "fsdp_config": WAYS[way]} if WAYS[way] else {}
        told = {
            "model": {"name": str(model_folder), "dtype": "float32"},
            "data": {"data": str(data_file), "eval_fraction": 0.067},  # 56 rows are left: 14 steps
            "training": ours | sharded | training,
        }
        path = folder / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(told))
        return ["train", "--config", str(path), "--out", str(out)]

    return make


@pytest.fixture(scope="module")
def uninterrupted(arguments_of, tmp_path_factory):
    """The run of two processes, and what they printed; made once for each way."""
    made = {}

    def of(way):
        if way not in made:
            out = tmp_path_factory.mktemp("uninterrupted") / "run"
            made[way] = out, launch(way, "command", *arguments_of(out, way))[0]
        return made[way]

    return of


def adapters(run_folder):
    return load_file(run_folder / "adapter_model.safetensors")


def held_out(run_folder):
    return [point.loss for point in aletheia.Run.read(run_folder).metrics.held_out_curve]


@slow
@pytest.mark.parametrize("way", WAYS)
def test_the_command_of_two_processes_leaves_one_run(way, uninterrupted, arguments_of, tmp_path, run):
    folder, done = uninterrupted(way)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path / "alone"
    averaging = "auto" if way == "DDP" else "off"  # which auto comes to where layers are sharded
    code, _, told = run(*arguments_of(alone, gradient_accumulation_steps=2, averaging=averaging))
    assert code == 0, told
    assert largest_difference(adapters(folder), adapters(alone)) < 1e-5
    assert held_out(folder) == pytest.approx(held_out(alone), rel=1e-5)
    settings = aletheia.Run.read(folder).metrics.settings
    assert (settings.processes, settings.averaging) == (2, "on" if way == "DDP" else "off")
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {path.name for path in alone.iterdir()} - {".lock"} >= {"report.html", "config.yaml"}
    for line in ("load ", "probe ", "plan ", "cache ", "wrote "):
        assert sum(text.startswith(line) for text in done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout.count("Held-out loss") == 1


@slow
def test_two_processes_take_the_rate_that_one_takes(arguments_of, tmp_path, run):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    done, _ = launch("DDP", "command", *arguments_of(folder, learning_rate="auto"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(*arguments_of(alone, learning_rate="auto", gradient_accumulation_steps=2))[0] == 0
    together, by_itself = (aletheia.Run.read(path).metrics.rate_race for path in (folder, alone))
    assert together.losses == pytest.approx(by_itself.losses, rel=1e-5)
    assert together.chosen == by_itself.chosen
    assert sum(line.startswith("rate ") for line in done.stderr.splitlines()) == 1
    assert largest_difference(adapters(folder), adapters(alone)) < 1e-5


@slow
def test_rates_are_not_raced_where_layers_are_sharded(arguments_of, tmp_path):
    way = "FSDP2, whole"
    done, _ = launch(way, "command", *arguments_of(tmp_path / "run", way, learning_rate="auto"))
    assert done.returncode != 0
    assert "--learning-rate is auto, but layers are sharded over processes; expected a number" in done.stderr


@slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_stopped_goes_on(way, uninterrupted, arguments_of, tmp_path, run):
    """SIGTERM reaches one process, all save and stop; another number of processes would see other rows."""
    expected, _ = uninterrupted(way)
    folder = tmp_path / "run"
    ends = {"ENDS": f"1 9 {int(signal.SIGTERM)}", "ENDED": str(tmp_path / "ended")}
    done, _ = launch(way, "command", *arguments_of(folder, way), **ends)
    assert done.returncode != 0
    assert "interrupted after step 9 of 24; the same command resumes from there" in done.stderr
    if way == "DDP":
        code, _, told = run(*arguments_of(folder))
        assert code != 0
        assert "processes" in told
    done, _ = launch(way, "command", *arguments_of(folder, way))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resume from step 9 of 24" in done.stderr
    assert largest_difference(adapters(folder), adapters(expected)) == 0
    assert held_out(folder) == held_out(expected)


@slow
@pytest.mark.parametrize(("way", "rank"), [("DDP", 0), ("DDP", 1), ("FSDP2, whole", 1), ("FSDP2, sharded", 0)])
def test_a_process_that_is_killed_ends_the_others(way, rank, uninterrupted, arguments_of, tmp_path):
    expected, _ = uninterrupted(way)
    folder, ended = tmp_path / "run", tmp_path / "ended"
    arguments = arguments_of(folder, way, save_steps=8)
    done, at = launch(way, "command", *arguments, ENDS=f"{rank} 13 {int(signal.SIGKILL)}", ENDED=str(ended))
    assert done.returncode != 0
    assert at - float(ended.read_text()) < 60
    done, _ = launch(way, "command", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resume from step 8 of 24" in done.stderr
    assert largest_difference(adapters(folder), adapters(expected)) == 0


def test_deepspeed_is_refused(examples):
    scores = aletheia.probe(make_model(), examples, batches=1)
    plan = aletheia.plan(scores, policy="last", rank=4)

    class UnderDeepSpeed:
        model = aletheia.adapt(make_model(), plan)
        is_deepspeed_enabled = True

    with pytest.raises(aletheia.errors.TrainingError, match=r"DeepSpeed.*DDP or FSDP2"):
        aletheia.attach(UnderDeepSpeed(), plan)
    with pytest.raises(aletheia.errors.SettingsError, match=r"`deepspeed`.*FSDP") as refused:
        aletheia.TrainSettings(deepspeed={"zero_optimization": {"stage": 3}})
    assert "\n" not in str(refused.value)


def test_data_parallel_is_refused(examples):
    """What Trainer does by itself where one process sees several GPUs."""
    plan = aletheia.plan(aletheia.probe(make_model(), examples, batches=1), policy="last", rank=4)

    class OnTwoGPUs:
        model = aletheia.adapt(make_model(), plan)
        args = SimpleNamespace(n_gpu=2)

    with pytest.raises(aletheia.errors.TrainingError, match=r"2 GPUs.*torchrun"):
        aletheia.attach(OnTwoGPUs(), plan)


def test_rows_that_do_not_divide_are_filled_up_from_the_beginning():
    """As docs/how-to/several-devices.md says of accelerate: 10 rows, two processes, batches of 2."""
    batches = BatchSampler(range(10), batch_size=2, drop_last=False)
    dealt = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in (0, 1)]
    assert dealt == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]]


def test_processes_with_sharded_layers_agree_on_their_passes_before_any(monkeypatch):
    """One that computes while another waits in the agreement would wait for ever."""
    events = []
    compute = source.row_states

    def passing(model, boundary, rows, *more):
        events.append("pass")
        return compute(model, boundary, rows, *more)

    def largest(numbers):  # another process lacks three rows
        events.append("agree")
        return [3 if numbers == [1] else number for number in numbers]

    monkeypatch.setattr(source, "row_states", passing)
    model = make_model()
    looked_up = PrefixSource(model, 2, lambda dtype: MemoryCache(), group=Group(largest, sharded=True))
    looked_up(BATCH)
    assert events == ["agree"] * 4 + ["pass"] * 3


def test_a_cache_that_one_process_cannot_open_is_used_by_none():
    """Sharded layers must run equally often in all processes."""
    model = make_model()
    others = iter([[0, 0], [0], [1]])  # usable and not packed, exact, but the cache of another process failed
    group = Group(lambda numbers: [max(pair) for pair in zip(numbers, next(others), strict=True)], sharded=True)
    looked_up = PrefixSource(model, 2, lambda dtype: MemoryCache(), group=group)
    assert looked_up(BATCH) is None
    assert looked_up(BATCH) is None
