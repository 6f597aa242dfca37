"""The training loop: transformers' Trainer on an adapted model, measured."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aletheia.anatomy.fingerprint import identify
from aletheia.data.batches import collate
from aletheia.data.examples import Examples
from aletheia.errors import ArtifactError, TrainingError
from aletheia.evaluation.held_out import held_out_loss
from aletheia.files import package_versions
from aletheia.planning.plan import Plan
from aletheia.tuning.adapters import check_adapters, lowest_trainable_layer
from aletheia.tuning.card import model_card
from aletheia.tuning.memory import peak_memory_bytes, reset_peak_memory
from aletheia.tuning.run import METRICS_FILE, PLAN_FILE, Metrics, PhaseSeconds, Run, TrainSettings
from aletheia.tuning.watch import TokenCounter, Watch

WARMUP_SHARE = 0.05
EVALUATIONS = 4  # held-out losses during training, after the one before it


def train(
    model: PeftModel,
    data: Examples,
    plan: Plan,
    out: str | Path,
    held_out: Examples,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    seed: int = 0,
    overwrite: bool = False,
    earlier_seconds: Mapping[str, float] | None = None,
    show_progress: bool = True,
) -> Run:
    """Train the adapters of ``model`` and leave a run folder: a standard PEFT adapter, the plan and the metrics.

    AdamW, linear decay after 5 % warm-up, gradient clipping at 1.0, no weight decay. Only adapters are trained;
    the graph starts at the boundary, so there is no backward pass and no optimizer state below it.

    Args:
        model: the adapted model, from :func:`aletheia.adapt`.
        data: rows to train on; their order depends on ``seed`` alone.
        plan: the plan the model was adapted with.
        out: the run folder.
        held_out: rows for the held-out loss, taken before, four times during and after.
        steps: optimizer steps; overrides ``epochs``.
        epochs: passes over ``data``.
        batch_size: sequences per step.
        learning_rate: peak learning rate.
        seed: of the order of rows.
        overwrite: allow ``out`` to hold another run, which is replaced.
        earlier_seconds: time already spent, by phase (``load``, ``probe``, ``plan``), for the record.
        show_progress: draw a progress bar on stderr.

    Raises:
        AdapterError: the model is not adapted as planned.
        ArtifactError: ``out`` is taken or cannot be written.
        TrainingError: a setting is out of range, or a loss is not finite.
    """
    check_settings(steps, epochs, batch_size, learning_rate)
    out = claim_output(out, overwrite)
    check_adapters(model, plan)
    settings = TrainSettings(
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=data.max_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        seed=seed,
    )
    watch = Watch(lambda: held_out_loss(model, held_out), EVALUATIONS, show_progress)
    reset_peak_memory(model.device)
    watch.measure(step=0)
    counter = TokenCounter(model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, scratch, steps, epochs),
            train_dataset=data,
            data_collator=partial(collate, pad_token_id=data.pad_token_id),
            callbacks=[watch],
        )
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        try:
            trainer.train()
        finally:
            tokens, labelled_tokens = counter.remove()
            watch.close()
    check_adapters(model, plan)
    earlier = dict(earlier_seconds or {})
    metrics = Metrics(
        model=identify(model.get_base_model()),
        data=data.identity,
        held_out_data=held_out.identity,
        held_out_rows=len(held_out),
        held_out_tokens=held_out.labelled_tokens,
        packages=package_versions(),
        settings=settings,
        steps=trainer.state.global_step,
        tokens=tokens,
        labelled_tokens=labelled_tokens,
        boundary=lowest_trainable_layer(model),
        trainable_parameters=plan.trainable_parameters,
        seconds=PhaseSeconds(
            load=earlier.get("load", 0.0),
            probe=earlier.get("probe", 0.0),
            plan=earlier.get("plan", 0.0),
            train=watch.train_seconds,
            eval=watch.eval_seconds,
        ),
        peak_memory_bytes=peak_memory_bytes(model.device),
        held_out_loss_before=watch.held_out_curve[0].loss,
        held_out_loss_after=watch.held_out_curve[-1].loss,
        train_curve=tuple(watch.train_curve),
        held_out_curve=tuple(watch.held_out_curve),
    )
    run = Run(out, metrics, plan)
    save(model, run)
    return run


def _arguments(settings: TrainSettings, scratch: str, steps: int | None, epochs: float) -> TrainingArguments:
    """Trainer settings; it saves nothing by itself, and shows a loss that is not finite instead of hiding it."""
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps or -1,
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        fp16=settings.dtype == "float16",
        use_cpu=settings.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=settings.device == "cuda",
    )


def save(model: PeftModel, run: Run) -> None:
    """Write the run folder; ``metrics.json`` comes last, so a folder that has one is complete.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / METRICS_FILE).unlink(missing_ok=True)
        model.save_pretrained(str(run.path), save_embedding_layers=False)
        (run.path / "README.md").write_text(model_card(run), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write the run to {run.path}: {error.strerror or error}") from error
    run.plan.write(run.path / PLAN_FILE)
    run.metrics.write(run.path / METRICS_FILE)


def claim_output(out: str | Path, overwrite: bool = False) -> Path:
    """Check early that a run may be written to ``out``.

    Raises:
        ArtifactError: it is a file, or a folder that holds something and ``overwrite`` is off.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; expected a folder for the run, choose another --out")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        held = "another run" if (out / METRICS_FILE).exists() else "other files"
        raise ArtifactError(f"{out} holds {held}; choose another --out or pass --overwrite")
    return out


def check_settings(steps: int | None, epochs: float, batch_size: int, learning_rate: float) -> None:
    """Refuse settings that are out of range.

    Raises:
        TrainingError: names the setting, what was found and what is expected.
    """
    limits = (("--steps", steps, 1), ("--batch-size", batch_size, 1))
    for flag, value, least in limits:
        if value is not None and value < least:
            raise TrainingError(f"{flag} is {value}; expected at least {least}")
    for flag, amount in (("--epochs", epochs), ("--learning-rate", learning_rate)):
        if not 0 < amount < float("inf"):
            raise TrainingError(f"{flag} is {amount:g}; expected a positive number")
