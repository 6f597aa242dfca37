"""Whether a score of layers predicts what a layer is worth: scores of the base model against ``single_layers.py``.

    .venv/bin/python benchmarks/single_layers.py OUT
    .venv/bin/python benchmarks/scores.py OUT

Scores are computed once per task, over 32 training rows, and kept in OUT/scores.csv; gains are read from
OUT/gains.jsonl, as far as it goes: of a task with every layer of at least one seed. Writes gains.csv, scores.csv,
spearman.csv and a page, README.md, into --to.
"""

import argparse
import csv
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from scores_page import COST, DRAWS, NAMES, page


def score_layers(base, data, rows: int) -> list[dict[str, float]]:
    """Every score of every layer, and the FLOPs per token of a step that adapts the layer alone."""
    from layer_scores import module_scores
    from single_layers import ALPHA, MATRICES, PEAK, RANK

    import aletheia
    from aletheia.anatomy.read import adaptable_modules, read_anatomy
    from aletheia.data.batches import on_device_of, sample_batches
    from aletheia.planning.cost import layer_costs

    model, anatomy = base.model.eval().requires_grad_(False), read_anatomy(base.model)
    papers = {f"paper_{count}": aletheia.probe(model, data.train, batches=count).layers for count in (5, rows)}
    modules = {name: module for name, module in adaptable_modules(model).items() if name.split(".")[-1] in MATRICES}
    batches = [on_device_of(model, batch) for batch in sample_batches(data.train, rows, 1, 0)]
    by_module = module_scores(model, modules, batches, RANK, ALPHA / RANK, PEAK)
    share = data.train.labelled_tokens / data.train.tokens
    ranks = dict.fromkeys(modules, RANK)
    costs = layer_costs(anatomy, ranks, RANK, data.train.tokens / len(data.train), share)
    lines = []
    for layer in range(anatomy.layer_count):
        own = [by_module[module.name] for module in anatomy.in_layer(layer) if module.name in by_module]
        line = {name: scores[layer] for name, scores in papers.items()}
        line |= {name: sum(found[name] for found in own) for name in own[0]}
        line |= {"depth": layer, "from_top": anatomy.layer_count - 1 - layer}
        line |= {"near_middle": min(layer + 1, anatomy.layer_count - layer), "flops": costs.step([layer])}
        lines.append(line)
    return lines


def read(path: Path) -> list[dict]:
    """Lines of a table of figures; the column ``task`` stays text."""
    if not path.exists():
        return []
    with path.open() as file:
        return [{k: v if k == "task" else float(v) for k, v in line.items()} for line in csv.DictReader(file)]


def write(path: Path, lines: list[dict]) -> None:
    """A table of figures, six digits each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)


@dataclass(frozen=True)
class Gains:
    """Labelled tokens of held-out rows [R], their summed loss in the base model [R] and after each run [S seeds, L layers, R]."""

    task: str
    layers: list[int]
    seeds: list[int]
    counts: np.ndarray
    base: np.ndarray
    nats: np.ndarray

    def losses(self, weights_R: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Nats per labelled token of the base model and of each run [S, L]; rows count ``weights_R`` times."""
        w_R = np.ones(len(self.counts)) if weights_R is None else weights_R
        tokens = w_R @ self.counts
        return w_R @ self.base / tokens, self.nats @ w_R / tokens

    def gains(self, weights_R: np.ndarray | None = None) -> np.ndarray:
        """Share of the base model's loss that each run takes away [S, L]."""
        base, losses_SL = self.losses(weights_R)
        return (base - losses_SL) / base


def read_gains(path: Path, task: str, steps: int) -> Gains | None:
    """The runs of a task: layers that any seed has, and the seeds that have them all; None without any."""
    runs = [
        run for run in map(json.loads, path.read_text().splitlines()) if (run["task"], run["steps"]) == (task, steps)
    ]
    base = next((run for run in runs if run["layer"] is None), None)
    found = {(run["seed"], run["layer"]): run for run in runs if run["layer"] is not None}
    if base is None or not found:
        return None
    by_seed = {seed: {layer for own, layer in found if own == seed} for seed, _ in sorted(found)}
    layers = sorted(max(by_seed.values(), key=len))
    seeds = [seed for seed, own in by_seed.items() if own >= set(layers)]
    nats = [[found[seed, layer]["nats"] for layer in layers] for seed in seeds]
    return Gains(task, layers, seeds, np.array(base["counts"]), np.array(base["nats"]), np.array(nats))


def spearman(a_XL: np.ndarray, b_L: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of ``a`` with ``b`` [X]; 0 where one does not vary."""
    x_XL, y_L = rankdata(a_XL, axis=-1), rankdata(b_L)
    x_XL, y_L = x_XL - x_XL.mean(axis=-1, keepdims=True), y_L - y_L.mean()
    size = np.sqrt((x_XL**2).sum(axis=-1) * (y_L**2).sum())
    return np.divide(x_XL @ y_L, size, out=np.zeros(len(x_XL)), where=size > 0)


def bootstrap(tables: list[np.ndarray], gains: list[Gains], draw_layers: bool = True) -> np.ndarray:
    """Correlations [draws, tasks, scores] with layers (the same in all tasks), held-out rows and seeds drawn again.

    With ``draw_layers`` off, these layers are all there is, and only the noise of the gains counts.
    """
    rng = np.random.default_rng(0)
    found = np.empty((DRAWS, len(gains), len(tables[0])))
    count = min(len(own.layers) for own in gains)
    for draw in range(DRAWS):
        layers = rng.integers(count, size=count) if draw_layers else np.arange(count)
        for at, (table_XL, own) in enumerate(zip(tables, gains, strict=True)):
            rows = len(own.counts)
            gains_SL = own.gains(rng.multinomial(rows, np.full(rows, 1 / rows)).astype(float))
            seeds = rng.integers(len(own.seeds), size=len(own.seeds))
            found[draw, at] = spearman(table_XL[:, layers], gains_SL[seeds].mean(axis=0)[layers])
    return found


def reliability(own: Gains) -> dict[str, float]:
    """How well the gains agree with themselves: over seeds, and over random halves of the held-out rows (mean of 200)."""
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(200):
        half = rng.permutation(len(own.counts)) % 2 == 0
        one, other = (own.gains(part.astype(float)).mean(axis=0) for part in (half, ~half))
        halves.append(spearman(one[None], other)[0])
    found = {"rows": float(np.mean(halves))}
    if len(own.seeds) > 1:
        gains_SL = own.gains()
        pairs = [spearman(gains_SL[a : a + 1], gains_SL[b])[0] for a in range(len(gains_SL)) for b in range(a)]
        found["seeds"] = float(np.mean(pairs))
    return found


def most(own: Gains) -> float:
    """About what a perfect score would reach: the root of the reliability of the mean over seeds (Spearman-Brown)."""
    found = reliability(own)
    r, parts = (found["seeds"], len(own.seeds)) if "seeds" in found else (found["rows"], 2)
    return max(parts * r / (1 + (parts - 1) * r), 0.0) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/results/scores"))
    parser.add_argument("--tasks", default="gsm8k,strategyqa,mix")
    parser.add_argument("--rows", type=int, default=32, help="training rows that scores are computed from")
    parser.add_argument("--steps", type=int, default=40, help="of the runs")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args()
    names, store = args.tasks.split(","), args.out / "scores.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if name not in {line["task"] for line in read(store)}]
    if missing:
        from tasks import DATA, task

        import aletheia
        from aletheia.anatomy.demo import demo_checkpoint

        base = aletheia.load(str(demo_checkpoint()), device=args.device)
        for name in missing:
            started = time.perf_counter()
            lines = score_layers(base, task(name, base.tokenizer, data=args.data or DATA), args.rows)
            write(store, [*read(store), *({"task": name, "layer": at} | line for at, line in enumerate(lines))])
            print(f"scores of {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if not (args.out / "gains.jsonl").exists():
        raise SystemExit(f"{args.out} has no gains.jsonl; run benchmarks/single_layers.py first")
    every = [read_gains(args.out / "gains.jsonl", name, args.steps) for name in names]
    gains = [own for own in every if own is not None]
    if not gains:
        raise SystemExit(
            f"{args.out / 'gains.jsonl'} has no task with its base model and a layer; expected one of {names}"
        )
    args.to.mkdir(parents=True, exist_ok=True)
    shutil.copy(store, args.to / "scores.csv")
    tables = []
    for own in gains:
        lines = [line for line in read(store) if line["task"] == own.task and line["layer"] in own.layers]
        scores = [[line[name] for line in lines] for name in NAMES]
        tables.append(np.array(scores + [[line[name] / line["flops"] for line in lines] for name in NAMES]))
    labels = [*NAMES, *(name + COST for name in NAMES)]
    found = np.array([spearman(table, own.gains().mean(axis=0)) for table, own in zip(tables, gains, strict=True)])
    found = np.vstack([found, found.mean(axis=0)])
    bounds = {}
    for suffix, draw_layers in (("", True), ("_rows", False)):
        draws = bootstrap(tables, gains, draw_layers)
        draws = np.concatenate([draws, draws.mean(axis=1, keepdims=True)], axis=1)
        bounds |= zip((f"low{suffix}", f"high{suffix}"), np.quantile(draws, [0.025, 0.975], axis=0), strict=True)
    lines = [
        {"task": task, "score": label, "spearman": found[t, x]} | {name: bound[t, x] for name, bound in bounds.items()}
        for t, task in enumerate([*(own.task for own in gains), "mean"])
        for x, label in enumerate(labels)
    ]
    write(args.to / "spearman.csv", lines)
    runs = []
    for own in gains:
        base_loss, losses_SL = own.losses()
        for seed, losses_L in zip(own.seeds, losses_SL, strict=True):
            for layer, loss in zip(own.layers, losses_L, strict=True):
                line = {"task": own.task, "layer": layer, "seed": seed, "base_loss": base_loss, "loss": loss}
                runs.append(line | {"gain": (base_loss - loss) / base_loss})
    write(args.to / "gains.csv", runs)
    used = [line for line in read(store) if line["task"] in {own.task for own in gains}]
    clipped = f"{sum(line['clipped'] for line in used):.0f} of {7 * len(used)}"
    text = page(gains, lines, {own.task: (reliability(own), most(own)) for own in gains}, clipped, args)
    (args.to / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
