"""The page and tables of the defaults, from the runs of ``frontier.py``.

    .venv/bin/python benchmarks/defaults_page.py [RUNS.jsonl ...]

Adds the runs of the files to docs/results/defaults/runs.jsonl.xz, then writes from all that is there: curves.csv.xz (every
run's settings and held-out losses), arms.csv (every arm against uniform LoRA), stopping.csv (uniform LoRA with several
patiences, averages and decays), and the table of README.md. Differences are paired by seed and held-out row; their
intervals come from 2,000 draws of seeds and rows.
"""

import csv
import json
import lzma
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

PLACE = Path("docs/results/defaults")
STORE, CURVES = PLACE / "runs.jsonl.xz", PLACE / "curves.csv.xz"
DRAWS, PATIENCE = 2000, 3
Run = dict[str, Any]
Cell = tuple[str, str, str]  # task, length, where it ran
NAMES = {"gsm8k": "GSM8K", "strategyqa": "StrategyQA", "mix": "mix"}
HEAD = ("cell", "arm", "rate", "seeds", "loss kept", "against uniform", "steps")
# how a default run of each cell was run: the arm, and its default rate
EVERY, FREEZING = "uniform", "freeze-0.5-15+mean"
DEFAULTS = {
    ("gsm8k", "40"): (EVERY, 0.00198),
    ("gsm8k", "150"): (EVERY, 0.00198),
    ("gsm8k", "epochs"): (FREEZING, 0.00187),
    ("strategyqa", "40"): (EVERY, 0.00198),
    ("strategyqa", "150"): (EVERY, 0.00198),
    ("strategyqa", "epochs"): (FREEZING, 0.00216),
    ("mix", "40"): (EVERY, 0.00198),
    ("mix", "150"): (EVERY, 0.00176),
    ("mix", "epochs"): (FREEZING, 0.00197),
}
AVERAGED = {("gsm8k", "epochs"), ("strategyqa", "epochs"), ("mix", "150"), ("mix", "epochs")}  # more than one pass
LENGTHS = {"40": "40 x 4", "150": "150 x 4", "epochs": "3 passes x 8"}


def key(run: Run) -> tuple[str, ...]:
    """The key of a run."""
    return (*(str(run[name]) for name in ("task", "length", "seed", "rate", "arm")), device(run))


def device(run: Run) -> str:
    """The device of a run; runs of ``frontier.py`` on a CPU do not record it."""
    return str(run.get("device", "CPU")).removeprefix("NVIDIA ")


def collected(files: Iterable[Path]) -> list[Run]:
    """All runs: those of the files, and those that only the store has."""
    runs: dict[tuple[str, ...], Run] = {}
    lines = lzma.decompress(STORE.read_bytes()).decode().splitlines() if STORE.exists() else []
    for line in (*lines, *(line for file in files for line in file.read_text().splitlines())):
        run = slim(json.loads(line))
        runs[key(run)] = run
    return [runs[name] for name in sorted(runs)]


def slim(run: Run) -> Run:
    """Losses of single rows where plain LoRA or ``aletheia train`` keeps them; elsewhere their sum is enough."""
    keeps = {id(rows_of_plain(run)), id(rows_of_ours(run))}

    def summed(points: Sequence[list]) -> list[list]:
        return [[*about, nats if id(nats) in keeps else [round(sum(nats), 2)]] for *about, nats in points]

    return run | {name: summed(run[name]) for name in ("points", "averages", "decays", "scaled") if run.get(name)}


def write_store(runs: Sequence[Run]) -> None:
    """The same runs give the same bytes."""
    PLACE.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(run) + "\n" for run in runs)
    STORE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def write_curves(runs: Sequence[Run]) -> None:
    """A line per run: its settings, then every curve as ``STEP:LOSS STEP:LOSS``; a strength is ``STEPxSTRENGTH``."""
    curves = ("losses", "mean 8", "mean 3", "decayed", "strengths", "strengths of mean 3")
    with lzma.open(CURVES, "wt", newline="", preset=9 | lzma.PRESET_EXTREME) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", "steps", "batch_size", "device", "seed", "rate", "arm", *curves])
        for run in runs:
            found: dict[str, list[tuple[Any, list[float]]]] = {name: [] for name in curves}
            found["losses"], found["decayed"] = run["points"], run["decays"]
            for step, eta, nats in run.get("averages", ()):
                found[f"mean {eta}"].append((step, nats))
            for step, eta, scale, nats in run.get("scaled", ()):
                found[f"strengths of mean {eta}" if eta else "strengths"].append((f"{step}x{scale:g}", nats))
            about = [
                run["task"],
                run["steps"],
                run["batch_size"],
                device(run),
                run["seed"],
                f"{run['rate']:g}",
                run["arm"],
            ]
            values = (" ".join(f"{at}:{loss(nats, run):.4f}" for at, nats in points) for points in found.values())
            table.writerow([*about, *values])


def loss(nats: Sequence[float], run: Run) -> float:
    """Nats per labelled token."""
    return sum(nats) / sum(run["counts"])


def kept(
    run: Run, patience: int | None = PATIENCE, points: Sequence[tuple[int, list[float]]] | None = None
) -> tuple[int, list[float], int]:
    """The point that is kept, its row losses, and the step after which the run stops; None: it never stops early."""
    points, best = points or run["points"], 0
    for at, (step, nats) in enumerate(points):
        if loss(nats, run) < loss(points[best][1], run):
            best = at
        elif patience is not None and at - best >= patience:
            return (*points[best], step)
    return (*points[best], points[-1][0])


def rows_of_plain(run: Run) -> list[float]:
    """Row losses of what plain LoRA with early stopping keeps."""
    return kept(run)[1]


def rows_of_ours(run: Run) -> list[float]:
    """Row losses of what ``aletheia train`` keeps."""
    return ours(run)[0]


def ours(run: Run) -> tuple[list[float], int, int]:
    """Row losses of what ``aletheia train`` keeps: of the average over several passes, and less of it where that is better.

    And the step after which the run stops, and how many strengths are tried.
    """
    eta = 3 if (run["task"], run["length"]) in AVERAGED else 0
    averages = [(step, nats) for step, own, nats in run.get("averages", ()) if own == eta]
    step, best, stop = kept(run, points=averages)
    scaled = {scale: nats for at, own, scale, nats in run.get("scaled", ()) if (at, own) == (step, eta)}
    tries = 0
    for scale in sorted(scaled, reverse=True):
        tries += 1
        if loss(scaled[scale], run) >= loss(best, run):
            break
        best = scaled[scale]
    return best, stop, tries


def difference(
    ours: Sequence[Run], theirs: Sequence[Run], keeps: tuple = (rows_of_plain, rows_of_plain)
) -> tuple[float, float, float] | None:
    """Relative difference of the mean loss of what is kept, with a 95 % interval; runs are paired by seed."""
    of_seed = {run["seed"]: run for run in theirs}
    pairs = [(run, of_seed[run["seed"]]) for run in ours if run["seed"] in of_seed]
    if not pairs:
        return None
    mine, other = (np.array([keep(pair[side]) for pair in pairs]) for side, keep in enumerate(keeps))  # [seeds, rows]
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


def best_uniform(arms: dict[tuple[str, float], list[Run]]) -> tuple[float, list[Run]]:
    """Uniform LoRA at the best of its rates, each with early stopping; rates with fewer seeds do not count."""
    uniform = {rate: runs for (arm, rate), runs in arms.items() if arm == "uniform"}
    most = max(map(len, uniform.values()))
    rate = min((rate for rate, runs in uniform.items() if len(runs) == most), key=lambda rate: mean_kept(uniform[rate]))
    return rate, uniform[rate]


def in_percent(value: tuple[float, float, float] | None) -> str:
    """``+0.4 % (-0.1 to +0.9)``."""
    if value is None:
        return ""
    middle, low, high = (100 * part for part in value)
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def compared(found: dict[Cell, dict[tuple[str, float], list[Run]]]) -> list[list[str]]:
    """Every arm and rate against uniform LoRA at its best rate: cell, arm, rate, seeds, loss kept, difference, steps."""
    lines = []
    for (task, length, place), arms in found.items():
        rate, best = best_uniform(arms)
        for (arm, own), runs in sorted(arms.items()):
            if "~" in arm:
                continue
            mark = "0 (it is that)" if (arm, own) == ("uniform", rate) else in_percent(difference(runs, best))
            stops = np.mean([kept(run)[2] / run["steps"] for run in runs])
            cell = f"{NAMES[task]} {LENGTHS[length]}, {place}"
            lines.append([cell, arm, f"{own:g}", str(len(runs)), f"{mean_kept(runs):.4f}", mark, f"{stops:.0%}"])
    return lines


def table_of_defaults(found: dict[Cell, dict[tuple[str, float], list[Run]]]) -> list[str]:
    """The default of every cell against plain uniform LoRA at its best rate, and at half and twice its rate."""
    lines = [
        "| task, steps x rows | default rate | loss kept | plain LoRA, best rate | default against it | half the rate | twice the rate |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    differences = []
    for length in LENGTHS:
        for task in NAMES:
            arms = found[task, length, "H200"]
            name, rate = DEFAULTS[task, length]
            best_rate, best = best_uniform(arms)
            runs = arms[name, rate]
            against = difference(runs, best, (rows_of_ours, rows_of_plain))
            differences.append(against[0] if against else 0.0)
            mean = np.mean([loss(rows_of_ours(run), run) for run in runs])
            others = [
                in_percent(difference(other, runs, (rows_of_ours, rows_of_ours)))
                for times in (0.5, 2)
                for other in [
                    next((x for (arm, own), x in arms.items() if (arm, near(own, times * rate)) == (name, True)), [])
                ]
            ]
            lines.append(
                f"| {NAMES[task]}, {LENGTHS[length]} | {rate:g} | {mean:.4f} | {mean_kept(best):.4f} at {best_rate:g} | "
                f"{in_percent(against)} | {' | '.join(other or 'not run' for other in others)} |"
            )
    return [*lines, f"| mean | | | | {100 * np.mean(differences):+.2f} % | | |"]


def near(rate: float, other: float) -> bool:
    """Whether two numbers are equal after rounding to three digits."""
    return abs(rate / other - 1) < 0.01


def write_arms(lines: Sequence[Sequence[str]]) -> None:
    """Every arm."""
    with (PLACE / "arms.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *lines])


def mean_of_averages(runs: Sequence[Run], eta: int) -> str:
    """Mean over runs of the lowest loss of averaged weights; empty without any."""
    losses = [[loss(nats, run) for _, own, nats in run.get("averages", ()) if own == eta] for run in runs]
    lowest = [min(own) for own in losses if own]
    return f"{np.mean(lowest):.4f}" if lowest else ""


def write_stopping(found: dict[Cell, dict[tuple[str, float], list[Run]]]) -> None:
    """What patience gives up and saves, on uniform LoRA at every rate, and what averages and decays would reach."""
    head = ["cell", "arm", "rate", "last", "best"]
    head += [f"patience {patience}{what}" for patience in (1, 2, 3) for what in ("", ", steps")]
    lines = [[*head, "mean 8", "mean 3", "decayed from a point"]]
    for (task, length, place), arms in found.items():
        for (arm, rate), runs in sorted(arms.items()):
            if arm not in ("uniform", "uniform~settle") or len(runs[0]["points"]) < 5:
                continue
            last = np.mean([loss(run["points"][-1][1], run) for run in runs])
            line = [f"{NAMES[task]} {LENGTHS[length]}, {place}", arm, f"{rate:g}", f"{last:.4f}"]
            line.append(f"{mean_kept(runs, None):.4f}")
            for patience in (1, 2, 3):
                stops = np.mean([kept(run, patience)[2] / run["steps"] for run in runs])
                line += [f"{mean_kept(runs, patience):.4f}", f"{stops:.0%}"]
            line += [mean_of_averages(runs, eta) for eta in (8, 3)]
            decays = ", ".join(f"{step}: {loss(nats, run):.4f}" for run in runs for step, nats in run["decays"])
            lines.append([*line, decays])
    with (PLACE / "stopping.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def main() -> None:
    runs = collected(map(Path, sys.argv[1:]))
    write_store(runs)
    write_curves(runs)
    found = cells(runs)
    write_arms(compared(found))
    write_stopping(found)
    page = PLACE / "README.md"
    start, end = "<!-- defaults -->", "<!-- /defaults -->"
    before, _, rest = (page.read_text() if page.exists() else start + end).partition(start)
    page.write_text(
        before + start + "\n\n" + "\n".join(table_of_defaults(found)) + "\n\n" + end + rest.partition(end)[2]
    )


if __name__ == "__main__":
    main()
