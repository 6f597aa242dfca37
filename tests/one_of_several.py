"""What one process of a launch does in test_distributed.py: ``command ARGUMENTS...`` or ``attach JSON``."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))


def command(arguments: list[str]) -> None:
    """``aletheia ARGUMENTS``; $ENDS may be ``RANK STEP SIGNAL``: what a process sends itself after a step."""
    from aletheia.cli.main import main
    from aletheia.training.train import RowTrainer

    rank, step, number = map(int, os.environ.get("ENDS", "-1 0 0").split())
    if rank == RANK:
        begin = RowTrainer.__init__

        def make(trainer, *given, **named):
            begin(trainer, *given, **named)
            trainer.add_callback(ends_after(step, number))

        RowTrainer.__init__ = make
    sys.argv = ["aletheia", *arguments]
    main()


def ends_after(step: int, number: int):
    """A callback that sends this process a signal after a step, and leaves the time of it in $ENDED."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                Path(os.environ["ENDED"]).write_text(str(time.time()))
                os.kill(os.getpid(), number)

    return Ends()


@contextmanager
def counted_rows():
    """Keys of the rows whose frozen prefix this process computes, and of those it stores on disk."""
    from aletheia.prefix import source
    from aletheia.prefix.cache import DiskCache, row_key

    counted = {"computed": [], "stored": []}
    compute, put = source.row_states, DiskCache.put

    def counting(model, boundary, rows, *more):
        counted["computed"] += [row_key(row.input_ids) for row in rows]
        return compute(model, boundary, rows, *more)

    def storing(cache, row, hidden_TD):
        counted["stored"].append(row_key(row.input_ids))
        put(cache, row, hidden_TD)

    source.row_states, DiskCache.put = counting, storing
    try:
        yield counted
    finally:
        source.row_states, DiskCache.put = compute, put


def attach(job: dict) -> None:
    """transformers' Trainer with a plan attached; rank 0 writes the adapters, every rank what it did."""
    from functools import partial

    import torch
    from safetensors.torch import save_file
    from tiny import make_model, make_tokenizer
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainingArguments

    import aletheia
    from aletheia.data.batches import collate
    from aletheia.data.encode import load_data

    out = Path(job["out"])
    rows = load_data(job["data"], make_tokenizer(), max_length=128)
    plan = aletheia.Plan.read(job["plan"])
    model = aletheia.adapt(make_model(), plan, seed=0)
    several = "RANK" in os.environ
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True} | job["fsdp"]}
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=5e-3, logging_steps=1,
        ddp_backend="gloo" if several else None, remove_unused_columns=False, seed=0,
        **job["arguments"] | (sharded if job["fsdp"] else {}),
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        partial(collate, pad_token_id=rows.pad_token_id),
        train_dataset=rows.subset(range(job["rows"])),
        eval_dataset=rows.subset(range(48, 56)),
        callbacks=[ends_after(job["dies_after"], signal.SIGKILL)] if job.get("dies_after") and RANK == 1 else [],
    )
    assert trainer.accelerator.is_fsdp2 == ("FSDP_ON_CPU" in os.environ)
    settings = aletheia.AttachSettings(
        cache=job.get("cache", "auto"), cache_dir=Path(job["cache_dir"].format(**os.environ))
    )
    attachment = aletheia.attach(trainer, plan, settings)
    with counted_rows() as counted:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    adapters = {name: value.detach() for name, value in trainer.model.named_parameters() if "lora_" in name}
    adapters = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()
        for name, value in adapters.items()
    }
    told = {
        **counted,
        "cache": attachment.decision.kind,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "held_out": [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"rank-{RANK}.json").write_text(json.dumps(told))
    if RANK == 0:
        save_file(adapters, str(out / "whole.safetensors"))
    if several:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if os.environ.get("FSDP_ON_CPU"):
        from cpu_fsdp import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    if sys.argv[1] == "command":
        command(sys.argv[2:])
    else:
        attach(json.loads(sys.argv[2]))
