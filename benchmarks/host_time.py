"""How long a processor takes to launch a step, layer by layer: a tiny model, so that nothing else takes time.

    python benchmarks/host_time.py [--device cuda]

Recorded layers are those of `cuda_graphs`. On a CPU their replays launch nothing, so that only what surrounds a launch is
timed; what is learned is then wrong. Operations are those that reach the device: no views.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from aletheia.execution.backend import entered, step_ways
from aletheia.execution.cuda.graphs import graphed_layers
from aletheia.execution.cuda.recorded import CudaRecorder
from aletheia.execution.fast import bfloat16_autocast

LAYERS, ROWS, TOKENS, VOCABULARY = 8, 4, 32, 256
PARTS = ("forward", "backward", "clipping", "optimizer")


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = operator(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        fresh = [leaf for leaf in tree_leaves(returned) if torch.is_tensor(leaf)]
        is_view = fresh and all(leaf.untyped_storage().data_ptr() in given for leaf in fresh)
        self.count += operator._schema.is_mutable or not is_view
        return returned


class Nothing:
    """A recorder whose replays do nothing."""

    def __init__(self, device: torch.device) -> None:
        pass

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return run(), lambda: None


class Steps:
    """Steps of a tiny adapted model, with the seconds of their parts."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
        self.model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()
        ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), device=device)
        self.batch = {"input_ids": ids, "labels": ids, "use_cache": False}
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, fused=True)

    def step(self) -> list[float]:
        """Seconds of each part; nothing waits for the device."""
        times = [time.perf_counter()]
        loss = self.model(**self.batch).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        return [end - start for start, end in pairwise(times)]

    def operations(self) -> dict[str, float]:
        """Operations of a layer, forward and backward; those around the layers are counted in."""
        with Operations() as seen:
            loss = self.model(**self.batch).loss
            forward = seen.count
            loss.backward()
        self.optimizer.zero_grad()
        return {"forward": forward / LAYERS, "backward": (seen.count - forward) / LAYERS}


@contextmanager
def plain(model: torch.nn.Module) -> Iterator[None]:
    """PEFT's own computation under autocast."""
    with bfloat16_autocast(model):
        yield


def ways_of(device: str) -> dict[str, Callable[[torch.nn.Module], AbstractContextManager[Any]]]:
    """What is timed, by name."""
    recorder = CudaRecorder if torch.device(device).type == "cuda" else Nothing
    graphs = partial(graphed_layers, shape=(ROWS, TOKENS), recorder=recorder)
    return {
        "plain PEFT": plain,
        "Aletheia": lambda model: entered(model, step_ways(model)),
        "Aletheia, recorded": lambda model: entered(model, step_ways(model) | {"layers as CUDA graphs": graphs}),
    }


def main() -> None:
    """Time every way in turn, in rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps, ways = Steps(given.device), ways_of(given.device)
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    counts: dict[str, dict[str, float]] = {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            with way(steps.model):
                for _ in range(3):
                    steps.step()
                seconds[name] += [steps.step() for _ in range(given.steps)]
                counts[name] = steps.operations()
            if given.device != "cpu":
                torch.accelerator.synchronize()
    for name, times in seconds.items():
        parts = dict(zip(PARTS, map(statistics.median, zip(*times, strict=True)), strict=True))
        layer = {part: round(1e3 * parts[part] / LAYERS, 3) for part in ("forward", "backward")}
        rest = {part: round(1e3 * parts[part], 2) for part in ("clipping", "optimizer")}
        print(json.dumps({"way": name, "ms_a_layer": layer, "ms_a_step": rest, "operations_a_layer": counts[name]}))


if __name__ == "__main__":
    main()
