"""What each layer is worth: every layer trained alone, and the held-out loss that it reaches.

    .venv/bin/python benchmarks/single_layers.py OUT --tasks gsm8k,strategyqa,mix --seeds 0,1
    .venv/bin/python benchmarks/single_layers.py OUT --tasks gsm8k --seeds 0 --layers 15 --check

LoRA of rank 16 on the seven matrices of one layer of SmolLM2-135M-Instruct, from PEFT's random start; 40 steps of 4 rows,
AdamW, linear decay. Order of rows and optimizer are those of ``frontier.py``. Below the one adapted layer the model is
the base model, so what enters the layer is computed once per task, from what entered the layer before, and is shared by
all seeds. One line per run goes to OUT/gains.jsonl, with the summed loss of each held-out row; the line of the base
model has no layer. Existing runs are not repeated. ``--check`` writes nothing: it trains each run a second time
in plain PEFT, every layer computed from the tokens, and prints both losses.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from frontier import factor, mean
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import DATA, Batcher, Task, nats_per_row, task

import aletheia
from aletheia.anatomy.demo import demo_checkpoint
from aletheia.anatomy.layerwise import hidden_states, layer_call
from aletheia.anatomy.modes import in_mode
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate, on_device_of
from aletheia.data.examples import Example
from aletheia.data.order import training_batches
from aletheia.execution.backend import fast_layers
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.fill import fill
from aletheia.prefix.stored import stored_prefix
from aletheia.probing.logits import labelled_logits

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, PEAK = 16, 32, 4e-3
BATCH_SIZE, HELD_OUT = 4, 96


class Entering:
    """What enters one layer of the base model, for all rows of a task; one layer's states are in memory at a time."""

    def __init__(self, model: torch.nn.Module, rows: Sequence[Example], pad_token_id: int) -> None:
        self.model, self.rows, self.pad = model, rows, pad_token_id
        self.layer, self.cache = 0, MemoryCache()

    def move_to(self, layer: int) -> None:
        """Go up to ``layer``: from the states of the layer before, or from the tokens where there are none."""
        if layer in (0, self.layer):
            return
        cache = MemoryCache()
        with fast_layers(self.model):
            if self.layer == 0:
                fill(self.model, layer, self.rows, cache, BATCH_SIZE, show_progress=False)
            else:
                self._go_on(layer, cache)
        self.layer, self.cache = layer, cache

    @torch.no_grad()
    def _go_on(self, layer: int, cache: MemoryCache) -> None:
        target = find_layers(self.model)[1][layer]
        with in_mode(self.model, training=False), stored_prefix(self.model, self.layer):
            for row in cache.missing(self.rows):  # each alone, as the cache is filled from the tokens
                batch = collate_with_prefix([row], self.pad, self.cache)
                del batch["labels"]
                call = layer_call(self.model, target, on_device_of(self.model, batch))
                assert call is not None
                cache.put(row, hidden_states(*call)[0])

    @contextmanager
    def fast(self, adapted: PeftModel) -> Iterator[Batcher]:
        """Steps from this layer up, and what makes their batches."""
        make: Batcher = partial(collate, pad_token_id=self.pad)
        if self.layer:
            make = partial(collate_with_prefix, pad_token_id=self.pad, cache=self.cache)
        with aletheia.fast_steps(adapted, self.layer or None):
            yield lambda rows: on_device_of(adapted, make(rows))


@contextmanager
def plain(adapted: PeftModel, pad_token_id: int) -> Iterator[Batcher]:
    """Steps from the tokens, as PEFT computes them; logits at labelled positions, which is where losses are read."""
    device, dtype = adapted.device.type, adapted.dtype
    # around many steps, its cache would keep the adapters as they were at the first
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)
    with labelled_logits(adapted), mixed:
        yield lambda rows: on_device_of(adapted, collate(rows, pad_token_id))


@contextmanager
def one_layer_adapted(model: torch.nn.Module, layer: int, seed: int) -> Iterator[PeftModel]:
    """LoRA on all matrices of ``layer``, taken off again at the end."""
    config = LoraConfig("CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=MATRICES, layers_to_transform=[layer])
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    try:
        yield adapted.train()
    finally:
        adapted.unload()


def train(adapted: PeftModel, batches: list[list[Example]], batch: Batcher) -> None:
    """One pass over ``batches``, as ``frontier.py`` trains."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.0, fused=True)
    for number, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * factor(number, len(batches), "linear")
        adapted(**batch(rows), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


class Sweep:
    """The runs of one task."""

    def __init__(self, model: torch.nn.Module, data: Task, seeds: list[int], steps: int) -> None:
        self.model, self.task, self.seeds = model, data, seeds
        lengths = [len(row) for row in data.train.examples]
        order = {seed: training_batches(lengths, BATCH_SIZE, steps, seed) for seed in seeds}
        self.batches = {seed: [[data.train[row] for row in rows] for rows in order[seed]] for seed in seeds}
        used = [row for batches in self.batches.values() for rows in batches for row in rows]
        self.entering = Entering(model, [*used, *data.held_out.examples], data.train.pad_token_id)
        self.counts = [row.labelled_tokens for row in data.held_out.examples]

    def base(self) -> list[float]:
        """Nats of each held-out row under the base model: an adapter at its start adds nothing."""
        with one_layer_adapted(self.model, 0, 0) as adapted, aletheia.fast_steps(adapted):
            make = partial(collate, pad_token_id=self.task.train.pad_token_id)
            return nats_per_row(adapted, self.task.held_out, lambda rows: on_device_of(adapted, make(rows)))

    def run(self, layer: int, seed: int, is_plain: bool = False) -> dict:
        """Nats of each held-out row after a run, and its seconds."""
        if not is_plain:
            self.entering.move_to(layer)
        started = time.perf_counter()
        with one_layer_adapted(self.model, layer, seed) as adapted:
            pad = self.task.train.pad_token_id
            with plain(adapted, pad) if is_plain else self.entering.fast(adapted) as batch:
                train(adapted, self.batches[seed], batch)
                trained = time.perf_counter()
                nats = nats_per_row(adapted, self.task.held_out, batch)
        seconds = {"seconds": trained - started, "held_out_seconds": time.perf_counter() - trained}
        return {"nats": nats} | {name: round(value, 2) for name, value in seconds.items()}


def check(sweep: Sweep, layers: list[int]) -> None:
    """Each run a second time in plain PEFT."""
    for layer in layers:
        for seed in sweep.seeds:
            fast, slow = sweep.run(layer, seed), sweep.run(layer, seed, is_plain=True)
            losses = [mean(run["nats"], sweep.counts) for run in (fast, slow)]
            apart = max(
                abs(a - b) / count for a, b, count in zip(fast["nats"], slow["nats"], sweep.counts, strict=True)
            )
            print(
                f"layer {layer} seed {seed}: {losses[0]:.5f} in {fast['seconds']} s, plain PEFT {losses[1]:.5f} in "
                f"{slow['seconds']} s, a row's loss at most {apart:.5f} apart",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="gsm8k,strategyqa,mix")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--layers", help="all by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    base = aletheia.load(str(demo_checkpoint()), dtype=args.dtype, device=args.device)
    base.model.requires_grad_(False)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    every = range(len(find_layers(base.model)[1]))
    layers = sorted(int(layer) for layer in args.layers.split(",")) if args.layers else list(every)
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "gains.jsonl"
    for name in args.tasks.split(","):
        sweep = Sweep(base.model, task(name, base.tokenizer, HELD_OUT, args.data), seeds, args.steps)
        if args.check:
            check(sweep, layers)
            continue
        found = losses_in(store, name, args.steps)
        if (None, None) not in found:
            keep(store, sweep, args.steps, None, None, {"nats": sweep.base()})
        loss = losses_in(store, name, args.steps)[None, None]
        print(f"{name}: base model {loss:.4f}", flush=True)
        for layer in layers:
            for seed in seeds:
                if (layer, seed) not in found:
                    line = keep(store, sweep, args.steps, layer, seed, sweep.run(layer, seed))
                    own = mean(line["nats"], line["counts"])
                    took = f"{line['seconds']} + {line['held_out_seconds']} s"
                    print(f"{name} layer {layer} seed {seed}: {loss:.4f} -> {own:.4f}, {took}", flush=True)


def keep(store: Path, sweep: Sweep, steps: int, layer: int | None, seed: int | None, found: dict) -> dict:
    """Write a run down."""
    line = {"task": sweep.task.name, "steps": steps, "layer": layer, "seed": seed, "counts": sweep.counts} | found
    with store.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def losses_in(store: Path, name: str, steps: int) -> dict[tuple, float]:
    """Nats per labelled token of the existing runs, by layer and seed."""
    lines = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    runs = [line for line in lines if (line["task"], line["steps"]) == (name, steps)]
    return {(run["layer"], run["seed"]): mean(run["nats"], run["counts"]) for run in runs}


if __name__ == "__main__":
    main()
