"""The PEFT adapter folder that other trainers start from: the adapter of a run, or the initial one of a plan (B = 0).

Each module keeps its own rank and alpha in it, even where the trainer's settings know only one.
"""

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from aletheia.adapters.adapt import adapt
from aletheia.adapters.saved_config import PICKLE, SAFETENSORS, read_lora_config
from aletheia.anatomy.load import load_without_weights
from aletheia.planning.plan import Plan
from aletheia.runs.exports.written import Task, copy_tokenizer
from aletheia.runs.folder import CARD_FILE

FOLDER = "adapter"
SEED = 0  # seed of the initial A matrices of a plan


def write_bridge(task: Task) -> None:
    """Write ``adapter/`` into the folder of an export.

    Raises:
        AdapterError: the adapter cannot be read, or holds a correction of its quantized base.
        ModelError: the base cannot be found, or is a GGUF file, which these trainers do not read.
        PlanError: the plan does not fit the base.
    """
    task.origin.check_no_gguf("these trainers read")
    folder = task.folder / FOLDER
    folder.mkdir()
    if task.origin.is_plan:
        assert task.origin.plan is not None
        _begin(task.origin.plan, task, folder)
        return
    task.origin.check_fits_any_base()
    config = read_lora_config(task.source, task.allow_pickle)
    weights = next(name for name in (SAFETENSORS, PICKLE) if (task.source / name).is_file())
    shutil.copyfile(task.source / weights, folder / weights)
    copy_tokenizer(task, folder)
    config.base_model_name_or_path, config.inference_mode = task.origin.base, True
    config.save_pretrained(str(folder))


def _begin(plan: Plan, task: Task, folder: Path) -> None:
    """Write the initial adapter of a plan: A as PEFT initializes it, B = 0."""
    model = load_without_weights(task.origin.base, task.trust_remote_code).model
    adapted = adapt(model, plan, identity=plan.model)
    drawn = torch.Generator().manual_seed(SEED)
    state = {name: _start(name, value, drawn) for name, value in adapted.named_parameters() if ".lora_" in name}
    adapted.peft_config["default"].base_model_name_or_path = task.origin.base
    adapted.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's


def _start(name: str, shape: Tensor, drawn: torch.Generator) -> Tensor:
    """The initial value of a factor: A as in PEFT's ``reset_lora_parameters``, B = 0."""
    value = torch.zeros(shape.shape)
    if ".lora_A." in name:
        torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=drawn)
    return value
