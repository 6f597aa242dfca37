"""The picture of the README: held-out loss over time, ``aletheia train`` against plain PEFT and Trainer.

    .venv/bin/python benchmarks/loss_over_time.py MODEL --data gsm8k/train.jsonl --held-out gsm8k/test.jsonl
    .venv/bin/python benchmarks/loss_over_time.py --draw

Both sides run at the same time, each in its own process on one core, so that the machine is the same for both. They get the same
rows, batch size, passes, learning rate and warm-up, and the same function takes the held-out loss. Counted are probe,
plan, cache and steps; loading and held-out losses are counted on neither side. Plain LoRA takes every step; ours may
stop early and keeps its best point, as it does by default. Writes docs/results/loss-over-time/runs.json and draws
picture.svg next to it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "loss-over-time"
COMMAND = "from aletheia.cli.main import main; main()"
NOT_COUNTED = ("load", "eval")
OURS, THEIRS, INK, GRID = "#1a7f5a", "#5f6368", "#202124", "#dadce0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--held-out-rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    parser.add_argument("--plain", metavar="JSON", help=argparse.SUPPRESS)  # the other process
    args = parser.parse_args()
    if args.plain:
        plain(json.loads(args.plain))
        return
    if not args.draw:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "runs.json").write_text(json.dumps(measured(args), indent=1) + "\n")
    draw(json.loads((FOLDER / "runs.json").read_text()))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides at once; plain LoRA gets the learning rate that ours takes by default."""
    import aletheia
    from aletheia.training.learning_rate import default_learning_rate

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, source, count in (("train", args.data, args.rows), ("held", args.held_out, args.held_out_rows)):
            (place / f"{name}.jsonl").write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
        model, steps = str(args.model.resolve()), args.epochs * -(-args.rows // args.batch_size)
        shared = {"epochs": args.epochs, "batch_size": args.batch_size}
        rate = default_learning_rate(aletheia.inspect(model).hidden_size, steps, args.epochs)
        options = {"--data": "train.jsonl", "--eval-data": "held.jsonl", "--out": "run", "--epochs": args.epochs}
        words = [str(word) for pair in (options | {"--batch-size": args.batch_size}).items() for word in pair]
        about = json.dumps({"model": model, "folder": folder, "steps": steps, "rate": rate} | shared)
        sides = [
            started(0, place, "-c", COMMAND, "train", model, *words),
            started(1, place, str(Path(__file__).resolve()), "--plain", about),
        ]
        if any(side.wait() for side in sides):
            raise SystemExit("a side failed; see above")
        metrics = json.loads((place / "run" / "metrics.json").read_text())
        if abs(metrics["settings"]["learning_rate"] / rate - 1) > 1e-6:
            raise SystemExit(f"ours took the rate {metrics['settings']['learning_rate']}, plain LoRA {rate}")
        theirs = json.loads((place / "plain.json").read_text())
    known = {"model": args.model.name, "task": "GSM8K", "rows": args.rows, "held_out_rows": args.held_out_rows}
    known |= shared | {"learning_rate": rate, "machine": platform.machine(), "cores_per_side": 1}
    known["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"about": known, "plain": theirs, "ours": of_run(metrics)}


def started(core: int, place: Path, *words: str) -> subprocess.Popen[bytes]:
    """A Python process on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["taskset", "-c", str(core), sys.executable, *words], cwd=place, env=environment)


def of_run(metrics: dict[str, Any]) -> dict[str, Any]:
    """Points [seconds, step, loss], what was kept, and when the run was over."""
    seconds = {phase: took for phase, took in metrics["seconds"].items() if phase not in NOT_COUNTED}
    before = sum(seconds.values()) - seconds["train"]
    curve = [[before + at["train_seconds"], at["step"], at["loss"]] for at in metrics["held_out_curve"] if at["step"]]
    kept = {"step": metrics["kept_step"], "loss": metrics["held_out_loss_after"]}
    first = [0.0, 0, metrics["held_out_loss_before"]]
    return {"curve": [first, *curve], "kept": kept, "seconds": sum(seconds.values()), "steps": metrics["steps"]}


def plain(about: dict[str, Any]) -> None:
    """LoRA of rank 16 on every linear layer, with transformers' Trainer and ``bf16=True``."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    import aletheia

    base, place, size = aletheia.load(about["model"], "bfloat16"), Path(about["folder"]), about["batch_size"]
    train, held = (aletheia.load_data(str(place / f"{name}.jsonl"), base.tokenizer) for name in ("train", "held"))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, every = get_peft_model(base.model, config), -(-about["steps"] // 12)
    curve = [[0.0, 0, aletheia.held_out_loss(model, held, size)]]

    class HeldOut(TrainerCallback):
        seconds = since = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every and state.global_step != about["steps"]:
                return
            self.seconds += time.perf_counter() - self.since
            curve.append([self.seconds, state.global_step, aletheia.held_out_loss(model, held, size)])
            print("plain: step {1}, {0:.0f} s, held-out loss {2:.4f}".format(*curve[-1]), flush=True)
            self.since = time.perf_counter()

    arguments = TrainingArguments(
        str(place / "plain"), num_train_epochs=about["epochs"], per_device_train_batch_size=size,
        learning_rate=about["rate"], warmup_steps=0.05, bf16=True, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in train.examples]
    collator = DataCollatorForSeq2Seq(base.tokenizer)
    trainer = Trainer(model, arguments, collator, train_dataset=rows, callbacks=[HeldOut()])
    trainer.train()
    found = {"curve": curve, "seconds": curve[-1][0], "steps": trainer.state.global_step}
    (place / "plain.json").write_text(json.dumps(found))


def draw(found: dict[str, Any]) -> None:
    """Two curves over minutes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    about, sides = found["about"], {"aletheia train": found["ours"], "plain PEFT and Trainer": found["plain"]}
    pyplot.rcParams |= {"svg.hashsalt": "loss", "font.family": "sans-serif", "font.size": 10, "text.color": INK}
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for (name, side), color, marker in zip(sides.items(), (OURS, THEIRS), "os", strict=True):
        minutes, losses = [at[0] / 60 for at in side["curve"]], [at[2] for at in side["curve"]]
        axes.plot(minutes, losses, color=color, marker=marker, markersize=4, linewidth=1.8)
        loss = side.get("kept", {"loss": losses[-1]})["loss"]
        text = f"{name}\n{loss:.3f} after {side['seconds'] / 60:.0f} min"
        axes.annotate(text, (minutes[-1], losses[-1]), (0, 16), textcoords="offset points", ha="right", color=color)
    lowest = min(at[2] for side in sides.values() for at in side["curve"])
    first = sorted(at[2] for side in sides.values() for at in side["curve"] if at[1])[-1]
    axes.set_ylim(lowest - 0.02, first + 0.06)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes of probe, cache and training", color=INK)
    axes.set_ylabel("held-out loss, nats a token", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{about['model'].split('.')[0]}, {about['task']}, {about['epochs']} passes over {about['rows']} rows"
    axes.set_title(title, loc="left", fontsize=11, weight="bold")
    figure.savefig(FOLDER / "picture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
