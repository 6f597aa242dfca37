"""How a run trains: our settings by name, and any field of transformers' TrainingArguments beside them.

Importing this loads no torch; a field that is not ours is looked up in transformers when it is given.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from aletheia.settings import MOST_EPOCHS, MOST_ROWS, MOST_STEPS, MOST_WORKERS, Settings, option

TRAINING, CACHE, SAVING, LOGGING = "Training", "Frozen prefix", "Checkpoints", "Logging and hub"

CacheKind = Literal["auto", "memory", "disk", "off"]
Recompute = Literal["off", "selective", "full"]
Averaging = Literal["auto", "on", "off"]
EVALUATIONS = 4  # per pass over the data
PATIENCE = 3  # evaluations

# settings that change no result: a run may go on with others
WITHOUT_INFLUENCE = (
    *("cache", "cache_dir", "save_steps", "save_total_limit", "report_to", "push_to_hub", "hub_model_id"),
    "allow_worse",
)

# fields of TrainingArguments that are not the user's here, and why
NOT_TAKEN = {
    "output_dir": "the run folder is `out`",
    "max_steps": "it is `steps` here",
    "num_train_epochs": "it is `epochs` here",
    "per_device_train_batch_size": "it is `batch_size` here",
    "activation_checkpointing": "it is `gradient_checkpointing` here: off, selective or full",
    "activation_checkpointing_kwargs": "it is `gradient_checkpointing` here: off, selective or full",
    "gradient_checkpointing_kwargs": "it is `gradient_checkpointing` here: off, selective or full",
    "train_sampling_strategy": "it is `group_by_length` here",
    "bf16": "adapters run in the dtype of the model, see `dtype`",
    "fp16": "adapters run in the dtype of the model, see `dtype`",
    "bf16_full_eval": "the model is evaluated as it is trained",
    "fp16_full_eval": "the model is evaluated as it is trained",
    "remove_unused_columns": "rows are tokenised before",
    "label_names": "rows are tokenised before",
    "resume_from_checkpoint": "it is `resume` here",
    "load_best_model_at_end": "it is `keep` here: best or last",
    "metric_for_best_model": "the held-out loss decides",
    "greater_is_better": "the held-out loss decides",
    "save_only_model": "such a checkpoint cannot be resumed from",
    "save_strategy": "it follows from `save_steps` and `keep` here",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint here anyway",
    "auto_find_batch_size": "the plan's phases are counted in steps",
    "ignore_data_skip": "a resumed run goes on with its own next row",
    "restore_callback_states_from_checkpoint": "a resumed run restores what it needs",
    "torch_compile": "it is `compile_layers` here",
    "torch_compile_backend": "hooks of the frozen prefix break the graph",
    "torch_compile_mode": "hooks of the frozen prefix break the graph",
    "dataloader_drop_last": "every row of an epoch is trained on",
    "accelerator_config": "batches are dealt out in the order that a resumed run needs",
    "logging_steps": "every step is logged: the curve and the check for values that are not finite need it",
    "logging_strategy": "every step is logged: the curve and the check for values that are not finite need it",
    "logging_first_step": "every step is logged",
    "eval_on_start": "the held-out loss is taken before the first step",
    "use_liger_kernel": "its loss and ours exclude each other; `liger` takes its other kernels",
    "deepspeed": "DeepSpeed is not supported; take FSDP",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "prediction_loss_only": "the held-out loss is what is evaluated",
    "do_train": "this command trains",
    "do_eval": "held-out rows are evaluated",
    "do_predict": "this command trains",
    "local_rank": "the launcher sets it",
    "use_cache": "a training step has no key-value cache",
    "per_device_eval_batch_size": "held-out rows go in batches of `batch_size`",
    "optim_target_modules": "the plan says what is adapted",
    "disable_tqdm": "progress is drawn here",
    "hub_token": "it would stand in the run folder; log in with 'hf auth login'",
    "hub_strategy": "the finished run is uploaded, not its checkpoints",
    "hub_always_push": "the finished run is uploaded, not its checkpoints",
    "data_seed": "`seed` decides the order of rows",
}


class TrainSettings(Settings):
    """How a run trains.

    Any other field of transformers' ``TrainingArguments`` may be given, too, under its own name, as long as it does not
    contradict what is done here; ``NOT_TAKEN`` lists those that do, and why.
    """

    SECTION: ClassVar[str] = "training"
    model_config = ConfigDict(extra="allow")

    steps: int | None = option(None, "Optimizer steps.", TRAINING, ge=1, le=MOST_STEPS)
    epochs: float | None = option(
        None, "Passes over the data (1 by default).", TRAINING, gt=0, le=MOST_EPOCHS, allow_inf_nan=False
    )
    batch_size: int = option(4, "Rows per device and pass through the model.", TRAINING, ge=1, le=MOST_ROWS)
    gradient_accumulation_steps: int = option(
        1,
        "Batches per optimizer step: each step sees this many times `batch_size` rows per device.",
        TRAINING,
        ge=1,
        le=MOST_ROWS,
    )
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] | None = option(
        None,
        "Peak learning rate (by default from width, steps and passes over the data); auto tries three and takes one.",
        TRAINING,
    )
    lr_scheduler_type: str = option("linear", "Schedule of the learning rate, as transformers names it.", TRAINING)
    warmup_steps: float = option(
        0.05, "Warm-up of the learning rate: steps, or below 1 a share of them.", TRAINING, ge=0, allow_inf_nan=False
    )
    optim: str = option(
        "adamw_torch_fused", "Optimizer, as transformers names it: adamw_bnb_8bit, adafactor, ...", TRAINING
    )
    weight_decay: float = option(0.0, "Weight decay of the adapters.", TRAINING, ge=0, allow_inf_nan=False)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", TRAINING, gt=0, allow_inf_nan=False)
    gradient_checkpointing: Recompute | Literal["auto"] = option(
        "auto",
        "Less memory, more time: compute again in backward all but matrix products (selective), or all (full); auto: "
        "the least that is predicted to fit in memory.",
        TRAINING,
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        "Put the rows of a batch one after another, without padding, each seeing itself alone; auto: on a GPU, in half "
        "precision, where the model's attention can.",
        TRAINING,
    )
    group_by_length: bool | None = option(
        None, "Make batches of rows of like length (by default where batches are padded).", TRAINING
    )
    compile_layers: bool = option(
        False, "Compile the layers that learn: the first steps take longer, the others fewer launches.", TRAINING
    )
    liger: bool = option(
        True,
        "On a GPU, with the extra `gpu`: Liger's kernels for norms, gates and rotary positions, unless layers are "
        "compiled.",
        TRAINING,
    )
    correct_quantization: bool = option(
        False,
        "With `quantize` nf4: a frozen part of each adapter takes back most of what that does. Fits NF4 only.",
        TRAINING,
    )
    seed: int = option(0, "Seed of everything that is drawn.", TRAINING, ge=0, le=2**32 - 1)
    evaluations: int | None = option(
        None,
        f"How often the held-out loss is taken during training ({EVALUATIONS} times per pass over the data by default, "
        "and after the last step).",
        TRAINING,
        ge=1,
        le=MOST_STEPS,
    )
    keep: Literal["best", "last"] = option(
        "best", "Which adapter is kept: that of the lowest held-out loss, or the last one.", TRAINING
    )
    averaging: Averaging = option(
        "auto",
        "Average the weights over the steps, for the held-out loss and the adapter that is kept; auto: in runs of more "
        "than one pass over the data, where layers are not sharded.",
        TRAINING,
    )
    rescale: bool = option(
        True,
        "With `keep` best: try the adapter at 0.8 of its strength, then at 0.6 and 0.4 while the held-out loss falls, "
        "and keep the best. Not where layers are sharded, nor for an adapter that is trained on.",
        TRAINING,
    )
    early_stop: bool = option(
        True, "End the run when the held-out loss no longer falls; without it, every planned step is taken.", TRAINING
    )
    early_stopping_patience: int | None = option(
        None,
        f"With `early_stop`: how many held-out losses in a row may be no new lowest one ({PATIENCE} by default).",
        TRAINING,
        ge=1,
    )
    allow_worse: bool = option(
        False,
        "Exit code 0 also for a run whose held-out loss is above the one before training (otherwise 3).",
        TRAINING,
    )
    cache: CacheKind = option("auto", "Where what enters the lowest layer that learns is kept.", CACHE)
    cache_dir: Path | None = option(None, "For a cache on disk ($ALETHEIA_CACHE, or your cache folder).", CACHE)
    free_prefix: bool = option(
        False, "Fill the cache before the first step, then drop the frozen layers from memory.", CACHE
    )
    save_steps: int | None = option(
        None, "Steps between checkpoints (by default by time: at most ten minutes are lost).", SAVING, ge=1
    )
    save_total_limit: int = option(2, "Checkpoints that are kept.", SAVING, ge=1)
    report_to: tuple[str, ...] = option(
        (), "Loggers: tensorboard, wandb, mlflow, trackio. Give it again for more.", LOGGING
    )
    push_to_hub: bool = option(False, "Upload the finished run to the hub.", LOGGING)
    hub_model_id: str | None = option(
        None, "Repository for `push_to_hub` (by default the name of the folder).", LOGGING
    )

    @property
    def groups_by_length(self) -> bool:
        """Whether rows of a batch are of like length: it saves padding, where there is some."""
        return self.packing != "on" if self.group_by_length is None else self.group_by_length

    @property
    def recompute(self) -> Recompute:
        """What backward computes again; ``auto`` is off where nobody has looked at the memory."""
        return "off" if self.gradient_checkpointing == "auto" else self.gradient_checkpointing

    @property
    def patience(self) -> int | None:
        """Held-out losses in a row without a new lowest one that end the run; None: every planned step is taken."""
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
            raise ValueError("`early_stopping_patience` is given and `early_stop` is false; expected one of them")
        if self.compile_layers and self.gradient_checkpointing == "selective":
            raise ValueError(
                "`compile_layers` is given with `gradient_checkpointing` selective, which looks at every product; "
                "expected full or off"
            )
        if self.free_prefix and self.cache == "off":
            raise ValueError("`free_prefix` is given with `cache` off; expected a cache to train from")
        if (self.model_extra or {}).get("eval_strategy") == "no":
            raise ValueError("`eval_strategy` is 'no'; expected steps or epoch: a run ends with a held-out loss")
        workers = (self.model_extra or {}).get("dataloader_num_workers", 0)
        if isinstance(workers, int) and workers > MOST_WORKERS:
            raise ValueError(f"`dataloader_num_workers` is {workers:,}; expected at most {MOST_WORKERS}")
        for name in self.model_extra or {}:
            if name in NOT_TAKEN:
                raise ValueError(f"`{name}` is given; expected it to be left out: {NOT_TAKEN[name]}")
        return self
