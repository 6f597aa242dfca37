"""The page and tables of the defaults, from the runs of ``frontier.py``.

    .venv/bin/python benchmarks/defaults_page.py [RUNS.jsonl ...]

Adds the runs of the files to docs/results/defaults/runs.jsonl.gz, then writes from all that is there: curves.csv (every
run's settings and held-out losses), arms.csv (every arm against uniform LoRA), and README.md. Differences are paired by
seed and held-out row; their intervals come from 2,000 draws of seeds and rows.
"""

import csv
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

PLACE = Path("docs/results/defaults")
STORE = PLACE / "runs.jsonl.gz"
DRAWS, PATIENCE = 2000, 3
Run = dict[str, Any]
Cell = tuple[str, str, str]  # task, length, where it ran
NAMES = {"gsm8k": "GSM8K", "strategyqa": "StrategyQA", "mix": "mix"}
IN_PAGE = ("uniform", "freeze-0.5-15", "freeze-0.25-15")
HEAD = ("cell", "arm", "rate", "seeds", "loss kept", "against uniform", "steps")
LENGTHS = {"40": "40 x 4", "150": "150 x 4", "epochs": "3 passes x 8"}


def key(run: Run) -> tuple[str, ...]:
    """What a run is known by."""
    return (*(str(run[name]) for name in ("task", "length", "seed", "rate", "arm")), device(run))


def device(run: Run) -> str:
    """Where it ran: runs of ``frontier.py`` on a CPU do not say."""
    return str(run.get("device", "CPU")).removeprefix("NVIDIA ")


def collected(files: Iterable[Path]) -> list[Run]:
    """All runs: those of the store, and those of the files that it does not have."""
    runs: dict[tuple[str, ...], Run] = {}
    lines = gzip.decompress(STORE.read_bytes()).decode().splitlines() if STORE.exists() else []
    for line in (*lines, *(line for file in files for line in file.read_text().splitlines())):
        run = json.loads(line)
        runs.setdefault(key(run), run)
    return [runs[name] for name in sorted(runs)]


def write_store(runs: Sequence[Run]) -> None:
    """The same runs give the same bytes."""
    PLACE.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(run) + "\n" for run in runs)
    STORE.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_curves(runs: Sequence[Run]) -> None:
    """A line per held-out loss; those of decays and of averaged weights say so behind the arm."""
    with (PLACE / "curves.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", "steps", "batch_size", "device", "seed", "rate", "arm", "step", "loss"])
        for run in runs:
            about = [
                run["task"],
                run["steps"],
                run["batch_size"],
                device(run),
                run["seed"],
                f"{run['rate']:g}",
                run["arm"],
            ]
            tried = [("", *point) for point in run["points"]] + [(" decayed", *point) for point in run["decays"]]
            tried += [(f" mean {eta}", step, nats) for step, eta, nats in run.get("averages", ())]
            for kind, step, nats in tried:
                table.writerow([*about[:-1], about[-1] + kind, step, f"{loss(nats, run):.4f}"])


def loss(nats: Sequence[float], run: Run) -> float:
    """Nats per labelled token."""
    return sum(nats) / sum(run["counts"])


def kept(run: Run, patience: int | None = PATIENCE) -> tuple[int, list[float], int]:
    """The point that is kept, its row losses, and the step after which the run stops; None: it never stops early."""
    best = 0
    for at, (step, nats) in enumerate(run["points"]):
        if loss(nats, run) < loss(run["points"][best][1], run):
            best = at
        elif patience is not None and at - best >= patience:
            return (*run["points"][best], step)
    return (*run["points"][best], run["points"][-1][0])


def difference(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[float, float, float] | None:
    """Relative difference of the mean loss of kept points, with a 95 % interval; runs are paired by seed."""
    of_seed = {run["seed"]: run for run in theirs}
    pairs = [(run, of_seed[run["seed"]]) for run in ours if run["seed"] in of_seed]
    if not pairs:
        return None
    mine, other = (np.array([kept(pair[side])[1] for pair in pairs]) for side in (0, 1))  # [seeds, rows]
    if np.array_equal(mine, other):
        return 0.0, 0.0, 0.0
    draw = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        seeds, rows = draw.integers(len(pairs), size=len(pairs)), draw.integers(mine.shape[1], size=mine.shape[1])
        at = np.ix_(seeds, rows)
        found.append(mine[at].sum() / other[at].sum() - 1)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(mine.sum() / other.sum() - 1), float(low), float(high)


def cells(runs: Sequence[Run]) -> dict[Cell, dict[tuple[str, float], list[Run]]]:
    """Runs by cell, then by arm and rate; a run on which decays and averages were tried is one of its arm, too."""
    found: dict[Cell, dict[tuple[str, float], list[Run]]] = {}
    for task in NAMES:
        for length, place in product(LENGTHS, sorted({device(run) for run in runs})):
            own: dict[tuple[str, float], list[Run]] = defaultdict(list)
            for run in runs:
                if (run["task"], run["length"], device(run)) == (task, length, place):
                    own[run["arm"], run["rate"]].append(run)
                    plain = own[run["arm"].removesuffix("~settle"), run["rate"]]
                    if run["seed"] not in {other["seed"] for other in plain}:
                        plain.append(run)
            if own:
                found[task, length, place] = dict(own)
    return found


def mean_kept(runs: Sequence[Run], patience: int | None = PATIENCE) -> float:
    """Mean loss of the kept points."""
    return float(np.mean([loss(kept(run, patience)[1], run) for run in runs]))


def yardstick(arms: dict[tuple[str, float], list[Run]]) -> tuple[float, list[Run]]:
    """Uniform LoRA at the best of its rates, each with early stopping; rates with fewer seeds do not count."""
    uniform = {rate: runs for (arm, rate), runs in arms.items() if arm == "uniform"}
    most = max(map(len, uniform.values()))
    rate = min((rate for rate, runs in uniform.items() if len(runs) == most), key=lambda rate: mean_kept(uniform[rate]))
    return rate, uniform[rate]


def told(value: tuple[float, float, float] | None) -> str:
    """``+0.4 % (-0.1 to +0.9)``."""
    if value is None:
        return ""
    middle, low, high = (100 * part for part in value)
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def compared(found: dict[Cell, dict[tuple[str, float], list[Run]]]) -> list[list[str]]:
    """Every arm and rate against the yardstick of its cell: cell, arm, rate, seeds, loss kept, difference, steps."""
    lines = []
    for (task, length, place), arms in found.items():
        rate, best = yardstick(arms)
        for (arm, own), runs in sorted(arms.items()):
            if "~" in arm:
                continue
            mark = "0 (it is that)" if (arm, own) == ("uniform", rate) else told(difference(runs, best))
            stops = np.mean([kept(run)[2] / run["steps"] for run in runs])
            cell = f"{NAMES[task]} {LENGTHS[length]}, {place}"
            lines.append([cell, arm, f"{own:g}", str(len(runs)), f"{mean_kept(runs):.4f}", mark, f"{stops:.0%}"])
    return lines


def table_of_arms(lines: Sequence[Sequence[str]]) -> list[str]:
    """Uniform LoRA at its rates, and lower layers that freeze, of which every cell has some."""
    own = [line for line in lines if line[1] in IN_PAGE]
    return [
        "| " + " | ".join(HEAD) + " |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join(x)} |" for x in own),
    ]


def write_arms(lines: Sequence[Sequence[str]]) -> None:
    """Every arm."""
    with (PLACE / "arms.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *lines])


def mean_of_averages(runs: Sequence[Run], eta: int) -> str:
    """Mean over runs of the lowest loss of averaged weights; empty without any."""
    losses = [[loss(nats, run) for _, own, nats in run.get("averages", ()) if own == eta] for run in runs]
    lowest = [min(own) for own in losses if own]
    return f"{np.mean(lowest):.4f}" if lowest else ""


def table_of_stopping(found: dict[Cell, dict[tuple[str, float], list[Run]]]) -> list[str]:
    """What patience gives up and saves, on uniform LoRA at every rate, and what a decay from a point would reach."""
    lines = [
        "| cell | rate | last | best | patience 1 | 2 | 3 | mean 8 | mean 3 | decayed from a point |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (task, length, place), arms in found.items():
        for (arm, rate), runs in sorted(arms.items()):
            if arm not in ("uniform", "uniform~settle") or len(runs[0]["points"]) < 5:
                continue
            last = np.mean([loss(run["points"][-1][1], run) for run in runs])
            stopped = [
                f"{mean_kept(runs, patience):.4f}, {np.mean([kept(run, patience)[2] / run['steps'] for run in runs]):.0%}"
                for patience in (1, 2, 3)
            ]
            means = [mean_of_averages(runs, eta) for eta in (8, 3)]
            decays = ", ".join(f"{step}: {loss(nats, run):.4f}" for run in runs for step, nats in run["decays"])
            name = f"{NAMES[task]} {LENGTHS[length]}, {place}" + ("" if arm == "uniform" else f", {arm}")
            lines.append(
                f"| {name} | {rate:g} | {last:.4f} | {mean_kept(runs, None):.4f} | {' | '.join((*stopped, *means))} | {decays} |"
            )
    return lines


def main() -> None:
    runs = collected(map(Path, sys.argv[1:]))
    write_store(runs)
    write_curves(runs)
    found = cells(runs)
    page = PLACE / "README.md"
    text = (
        page.read_text() if page.exists() else "<!-- arms -->\n<!-- /arms -->\n<!-- stopping -->\n<!-- /stopping -->\n"
    )
    lines_of_arms = compared(found)
    write_arms(lines_of_arms)
    for name, lines in (("arms", table_of_arms(lines_of_arms)), ("stopping", table_of_stopping(found))):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    page.write_text(text)


if __name__ == "__main__":
    main()
