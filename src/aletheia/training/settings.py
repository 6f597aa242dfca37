"""How a run trains: our settings by name, and any field of transformers' TrainingArguments beside them.

Importing this loads no torch; a field that is not ours is looked up in transformers when it is given.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

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

    steps: int | None = option(
        None, "Optimizer steps to train for, instead of `epochs`. (default: one pass)", LENGTH, ge=1, le=MOST_STEPS
    )
    epochs: float | None = option(
        None,
        "Passes over the data to train for, instead of `steps`; 0.5 is half of the rows. (default: 1)",
        LENGTH,
        gt=0,
        le=MOST_EPOCHS,
        allow_inf_nan=False,
    )
    batch_size: int = option(4, "Rows that go through the model at once, on each device.", LENGTH, ge=1, le=MOST_ROWS)
    gradient_accumulation_steps: int = option(
        1,
        "Batches that add up to one optimizer step, which then learns from this many times `batch_size` rows.",
        LENGTH,
        ge=1,
        le=MOST_ROWS,
    )
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] | None = option(
        None,
        "Highest learning rate, such as 2e-4. auto tries three for a few steps and takes the best. (default: computed "
        "from the model's width, the steps and the passes over the data)",
        RATE,
    )
    lr_scheduler_type: str = option(
        "linear",
        "How the learning rate changes after the warm-up, by transformers' name: linear, cosine, constant, ...",
        RATE,
    )
    warmup_steps: float = option(
        0.05,
        "Steps over which the learning rate rises from 0; below 1 it is a share of all steps.",
        RATE,
        ge=0,
        allow_inf_nan=False,
    )
    optim: str = option(
        "adamw_torch_fused", "Optimizer, by transformers' name: adamw_torch_fused, adamw_bnb_8bit, adafactor, ...", RATE
    )
    weight_decay: float = option(0.0, "Weight decay of the adapters.", RATE, ge=0, allow_inf_nan=False)
    max_grad_norm: float = option(
        1.0, "Gradients above this norm are scaled down to it.", RATE, gt=0, allow_inf_nan=False
    )
    gradient_checkpointing: Recompute | Literal["auto"] = option(
        "auto",
        "Save memory by computing activations again in the backward pass: off, selective (all but matrix products) or "
        "full. auto takes the first of them that is predicted to fit in memory.",
        SPEED,
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        "Put the rows of a batch into one sequence without padding; no row sees another. auto: on a GPU in half "
        "precision, where the model's attention can.",
        SPEED,
    )
    group_by_length: bool | None = option(
        None, "Make batches of rows of similar length, which saves padding. (default: where batches are padded)", SPEED
    )
    compile_layers: bool = option(
        False, "Compile the layers that learn with torch.compile: the first steps take longer, the others less.", SPEED
    )
    liger: bool = option(
        True,
        "Use Liger's kernels for norms, gates and rotary positions. On a GPU only, with the extra gpu installed, and "
        "not with `compile_layers`.",
        SPEED,
    )
    correct_quantization: bool = option(
        False,
        "With `quantize` nf4: a frozen part of each adapter makes up for most of the error of 4 bits. The adapter then "
        "fits the model in nf4 only.",
        SPEED,
    )
    seed: int = option(
        0,
        "Seed of all that is random: which rows are held out, the order of the others, how adapters start.",
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
        "best", "Which adapter is kept: best (the lowest held-out loss) or last (after the last step).", SAVING
    )
    averaging: Averaging = option(
        "auto",
        "Measure and keep the average of the weights over the steps. auto: in runs of more than one pass over the "
        "data; off where layers are sharded.",
        SAVING,
    )
    rescale: bool = option(
        True,
        "With `keep` best: in the end, try the adapter at 0.8, 0.6 and 0.4 of its strength while the held-out loss "
        "falls, and keep the best. Not for sharded layers, nor an adapter that is trained further.",
        SAVING,
    )
    early_stop: bool = option(
        True, "Stop when the held-out loss no longer falls. Without it, every planned step is taken.", SAVING
    )
    early_stopping_patience: int | None = option(
        None,
        f"With `early_stop`: how many held-out losses in a row without a new lowest one end the run. (default: "
        f"{PATIENCE})",
        SAVING,
        ge=1,
    )
    allow_worse: bool = option(
        False, "Exit with 0 instead of 3 where the held-out loss ends above the one before training.", SAVING
    )
    cache: CacheKind = option(
        "auto",
        "Where to keep the output of the frozen layers, so that it is computed once per row: memory, disk or off. "
        "auto: in memory, then on disk where reading is faster than computing.",
        SPEED,
    )
    cache_dir: Path | None = option(
        None, "Folder for a cache on disk. (default: $ALETHEIA_CACHE, else your cache folder)", SPEED
    )
    free_prefix: bool = option(
        False, "Fill the cache before the first step, then remove the frozen layers from memory.", SPEED
    )
    save_steps: int | None = option(
        None,
        "Steps between checkpoints to resume from. (default: by time, so that at most ten minutes are lost)",
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
