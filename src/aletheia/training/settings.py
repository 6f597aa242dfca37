"""How a run trains: settings by name, and any other field of transformers' TrainingArguments.

Importing this loads no torch; other fields are checked against transformers only when a run starts.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from aletheia.data.order import Order
from aletheia.settings import (
    LENGTH,
    MOST_EPOCHS,
    MOST_ROWS,
    MOST_STEPS,
    MOST_WORKERS,
    OUTPUT,
    RATE,
    SAVING,
    SPEED,
    Settings,
    option,
)

CacheKind = Literal["auto", "memory", "disk", "off"]
Recompute = Literal["off", "selective", "full"]
Averaging = Literal["auto", "on", "off"]
EVALUATIONS = 4  # per pass over the data
PATIENCE = 3  # evaluations

# settings that change no result: a run may resume with other values
WITHOUT_INFLUENCE = (
    *("cache", "cache_dir", "save_steps", "save_total_limit", "report_to", "push_to_hub", "hub_model_id"),
    "allow_worse",
)

# fields of TrainingArguments that users cannot set, and why
NOT_TAKEN = {
    "output_dir": "the run folder is `out`",
    "max_steps": "use `steps`",
    "num_train_epochs": "use `epochs`",
    "per_device_train_batch_size": "use `batch_size`",
    "activation_checkpointing": "use `gradient_checkpointing`: off, selective or full",
    "activation_checkpointing_kwargs": "use `gradient_checkpointing`: off, selective or full",
    "gradient_checkpointing_kwargs": "use `gradient_checkpointing`: off, selective or full",
    "train_sampling_strategy": "use `group_by_length`",
    "bf16": "adapters run in the dtype of the model, see `dtype`",
    "fp16": "adapters run in the dtype of the model, see `dtype`",
    "bf16_full_eval": "the model is evaluated as it is trained",
    "fp16_full_eval": "the model is evaluated as it is trained",
    "remove_unused_columns": "rows are tokenised in advance",
    "label_names": "rows are tokenised in advance",
    "resume_from_checkpoint": "use `resume`",
    "load_best_model_at_end": "use `keep`: best or last",
    "metric_for_best_model": "the held-out loss decides",
    "greater_is_better": "the held-out loss decides",
    "save_only_model": "a run cannot resume from such a checkpoint",
    "save_strategy": "it follows from `save_steps` and `keep`",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C always save a checkpoint",
    "auto_find_batch_size": "the plan's phases are counted in steps",
    "ignore_data_skip": "a resumed run continues with its next row",
    "restore_callback_states_from_checkpoint": "a resumed run restores what it needs",
    "torch_compile": "use `compile_layers`",
    "torch_compile_backend": "hooks of the frozen prefix break the graph",
    "torch_compile_mode": "hooks of the frozen prefix break the graph",
    "dataloader_drop_last": "every row of an epoch is trained on",
    "accelerator_config": "batches come in the order that a resumed run needs",
    "logging_steps": "every step is logged: the curve and the check for values that are not finite need it",
    "logging_strategy": "every step is logged: the curve and the check for values that are not finite need it",
    "logging_first_step": "every step is logged",
    "eval_on_start": "the held-out loss is always measured before the first step",
    "use_liger_kernel": "its loss replaces the one of fast steps; `liger` uses its other kernels",
    "deepspeed": "DeepSpeed is not supported; use FSDP",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "prediction_loss_only": "evaluation measures the held-out loss alone",
    "do_train": "this command always trains",
    "do_eval": "this command always evaluates the held-out rows",
    "do_predict": "this command trains and does not predict",
    "local_rank": "the launcher sets it",
    "use_cache": "a training step has no key-value cache",
    "per_device_eval_batch_size": "held-out batches have as many tokens as training batches at most",
    "optim_target_modules": "the plan says which modules are adapted",
    "disable_tqdm": "aletheia prints its own progress",
    "hub_token": "the run folder would contain it; log in with 'hf auth login'",
    "hub_strategy": "the finished run is uploaded, not its checkpoints",
    "hub_always_push": "the finished run is uploaded, not its checkpoints",
    "data_seed": "`seed` determines the order of rows",
}


class TrainSettings(Settings):
    """How a run trains.

    Any other field of transformers' ``TrainingArguments`` may be given under its own name. ``NOT_TAKEN`` lists the
    exceptions, with the reason for each.
    """

    SECTION: ClassVar[str] = "training"
    model_config = ConfigDict(extra="allow")

    steps: int | None = option(
        None, "Optimizer steps to train for, instead of `epochs`. (default: one pass)", LENGTH, ge=1, le=MOST_STEPS
    )
    epochs: float | None = option(
        None,
        "Passes over the data to train for, instead of `steps`; 0.5 means half of the rows. (default: 1)",
        LENGTH,
        gt=0,
        le=MOST_EPOCHS,
        allow_inf_nan=False,
    )
    batch_size: int = option(4, "Rows per batch, on each device.", LENGTH, ge=1, le=MOST_ROWS)
    gradient_accumulation_steps: int = option(
        1,
        "Batches per optimizer step. A step learns from this many times `batch_size` rows.",
        LENGTH,
        ge=1,
        le=MOST_ROWS,
    )
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] | None = option(
        None,
        "Peak learning rate, such as 2e-4. auto tries three rates for a few steps and takes the best. (default: "
        "computed from the model's width, the steps and the passes over the data)",
        RATE,
    )
    lr_scheduler_type: str = option(
        "linear",
        "Learning-rate schedule after the warm-up, by transformers' name: linear, cosine, constant, ...",
        RATE,
    )
    warmup_steps: float = option(
        0.05,
        "Steps over which the learning rate rises from 0; a value below 1 is a share of all steps.",
        RATE,
        ge=0,
        allow_inf_nan=False,
    )
    optim: str = option(
        "adamw_torch_fused", "Optimizer, by transformers' name: adamw_torch_fused, adamw_bnb_8bit, adafactor, ...", RATE
    )
    weight_decay: float = option(0.0, "Weight decay of the adapters.", RATE, ge=0, allow_inf_nan=False)
    max_grad_norm: float = option(
        1.0, "Gradients with a larger norm are scaled down to this norm.", RATE, gt=0, allow_inf_nan=False
    )
    gradient_checkpointing: Recompute | Literal["auto"] = option(
        "auto",
        "Save memory by computing activations again in the backward pass: off, selective (all but matrix products) or "
        "full. auto takes the first of these that is predicted to fit in memory.",
        SPEED,
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        "Put the rows of a batch into one sequence without padding; rows do not attend to each other. auto: on, on a "
        "GPU in half precision, if the model's attention supports it.",
        SPEED,
    )
    group_by_length: bool | None = option(
        None,
        "Make batches of rows of similar length, which saves padding; off: of random rows. (default: on where batches "
        "are padded; where they are packed, all get nearly the same number of tokens)",
        SPEED,
    )
    compile_layers: bool = option(
        False,
        "Compile the layers that learn with torch.compile. The first steps take longer, all others less time.",
        SPEED,
    )
    cuda_graphs: bool = option(
        False,
        "On one GPU, with packed rows: record the layers as CUDA graphs and replay them, which takes far fewer "
        "launches. Batches are filled up to one size.",
        SPEED,
    )
    liger: bool = option(
        True,
        "Use Liger's kernels for norms, gates and rotary positions: on a GPU, with the extra gpu installed, and "
        "without `compile_layers`.",
        SPEED,
    )
    correct_quantization: bool = option(
        False,
        "With `quantize` nf4: add a frozen part to each adapter that corrects most of the 4-bit error. The adapter "
        "then fits only the nf4 model.",
        SPEED,
    )
    seed: int = option(
        0,
        "Seed of everything random: which rows are held out, the order of the others, and the initial adapters.",
        LENGTH,
        ge=0,
        le=2**32 - 1,
    )
    evaluations: int | None = option(
        None,
        "How many times to measure the held-out loss during training, the last time after the last step. (default: "
        f"{EVALUATIONS} times per pass over the data)",
        SAVING,
        ge=1,
        le=MOST_STEPS,
    )
    keep: Literal["best", "last"] = option(
        "best", "Which adapter to keep: best (lowest held-out loss) or last (after the last step).", SAVING
    )
    averaging: Averaging = option(
        "auto",
        "Evaluate and keep the average of the weights over the steps: on, off, or auto, which is on in runs of more "
        "than one pass over the data, unless layers are sharded.",
        SAVING,
    )
    rescale: bool = option(
        True,
        "With `keep` best: at the end, try the adapter at 0.8, 0.6 and 0.4 of its strength while the held-out loss "
        "falls, and keep the best. Not with sharded layers or an adapter that is trained further.",
        SAVING,
    )
    early_stop: bool = option(
        True, "Stop when the held-out loss no longer falls. Otherwise the run takes every planned step.", SAVING
    )
    early_stopping_patience: int | None = option(
        None,
        f"With `early_stop`: stop after this many held-out losses in a row without a new lowest one. (default: "
        f"{PATIENCE})",
        SAVING,
        ge=1,
    )
    allow_worse: bool = option(
        False, "Exit with 0 instead of 3 if the held-out loss is higher at the end than before training.", SAVING
    )
    cache: CacheKind = option(
        "auto",
        "Where to keep the output of the frozen layers, so that it is computed once per row: memory, disk or off. "
        "auto: in memory, then on disk if reading is faster than computing.",
        SPEED,
    )
    cache_dir: Path | None = option(
        None, "Folder for a cache on disk. (default: $ALETHEIA_CACHE, else your cache folder)", SPEED
    )
    free_prefix: bool = option(
        False, "Fill the cache before the first step, then free the memory of the frozen layers.", SPEED
    )
    save_steps: int | None = option(
        None,
        "Steps between checkpoints to resume from. (default: by time, so that at most ten minutes of work are lost)",
        SAVING,
        ge=1,
    )
    save_total_limit: int = option(2, "How many checkpoints to keep; older ones are removed.", SAVING, ge=1)
    report_to: tuple[str, ...] = option(
        (), "Also log to tensorboard, wandb, mlflow or trackio. Repeat the option for more. (default: none)", OUTPUT
    )
    push_to_hub: bool = option(False, "Upload the finished run to the hub.", OUTPUT)
    hub_model_id: str | None = option(
        None, "Repository on the hub for `push_to_hub`, as name or owner/name. (default: the run folder's name)", OUTPUT
    )

    @property
    def order(self) -> Order:
        """How rows are put into batches: grouped where batches are padded, balanced where they are packed."""
        if self.group_by_length is None:
            return "balanced" if self.packing == "on" else "grouped"
        return "grouped" if self.group_by_length else "random"

    @property
    def recompute(self) -> Recompute:
        """What backward computes again; ``auto`` is off until it is resolved by a look at the memory."""
        return "off" if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

    @property
    def patience(self) -> int | None:
        """How many held-out losses in a row without a new lowest one end the run; None: the run never stops early."""
        return (self.early_stopping_patience or PATIENCE) if self.early_stop else None

    @model_validator(mode="before")
    @classmethod
    def _one_logger(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("report_to"), str):
            return given | {"report_to": () if given["report_to"] == "none" else (given["report_to"],)}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` and `epochs` are both given; expected one of them")
        if self.early_stopping_patience is not None and not self.early_stop:
            raise ValueError(
                "`early_stopping_patience` is given and `early_stop` is false; expected `early_stop` true with it"
            )
        if self.compile_layers and self.gradient_checkpointing == "selective":
            raise ValueError(
                "`compile_layers` is given with `gradient_checkpointing` selective, which needs to see every matrix "
                "product; expected full or off"
            )
        if self.cuda_graphs and self.gradient_checkpointing in ("selective", "full"):
            raise ValueError(
                f"`cuda_graphs` is given with `gradient_checkpointing` {self.gradient_checkpointing}, but recorded "
                "layers keep their activations; expected off or auto"
            )
        if self.cuda_graphs and self.packing == "off":
            raise ValueError("`cuda_graphs` is given with `packing` off, but only packed batches have one size")
        if self.free_prefix and self.cache == "off":
            raise ValueError("`free_prefix` is given with `cache` off; expected a cache to train from")
        if (self.model_extra or {}).get("eval_strategy") == "no":
            raise ValueError(
                "`eval_strategy` is 'no'; expected steps or epoch, because a run ends with a held-out loss"
            )
        workers = (self.model_extra or {}).get("dataloader_num_workers", 0)
        if isinstance(workers, int) and workers > MOST_WORKERS:
            raise ValueError(f"`dataloader_num_workers` is {workers:,}; expected at most {MOST_WORKERS}")
        for name in self.model_extra or {}:
            if name in NOT_TAKEN:
                raise ValueError(f"`{name}` cannot be set; expected it to be left out: {NOT_TAKEN[name]}")
        return self
