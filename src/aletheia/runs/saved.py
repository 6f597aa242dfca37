"""An adapter that was saved, put back on its base model."""

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from aletheia.adapters.adapt import adapted_modules
from aletheia.anatomy.fingerprint import identify
from aletheia.data.sources import one_line
from aletheia.data.templates import read_template
from aletheia.errors import AdapterError
from aletheia.planning.plan import Plan
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, Metrics

TEMPLATE_FILE = "chat_template.jinja"  # as tokenizers of transformers save it


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """Put the adapter of a run folder, or of any PEFT adapter folder, on its base model, frozen and in eval mode.

    Raises:
        PlanError: the run was made on another base model.
        AdapterError: there is no adapter, or its modules, shapes or weights do not fit the model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} holds no adapter_config.json; expected a run folder or a PEFT adapter folder")
    if isinstance(model, PeftModel):
        raise AdapterError("the model carries an adapter already; expected a base model (merge or unload it first)")
    plan = Plan.read(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if plan is not None:
        plan.check_model(identify(model))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        stored = set(load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # a foreign folder: PEFT raises whatever its parts raise
        raise AdapterError(
            f"{folder} does not fit this model ({one_line(error)}); expected an adapter trained on this base model"
        ) from error
    # PEFT leaves weights without a place, and places without a weight, at that; embeddings may be stored beside
    lost = {name for name in stored - expected if ".lora_" in name}
    if absent := sorted((expected - stored) | lost):
        raise AdapterError(
            f"{folder} does not fit this model: {len(absent)} weight(s) are only on one side, first {absent[0]}; "
            "expected an adapter trained on this base model"
        )
    if plan is not None:
        metrics = Metrics.read(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else None
        _check_plan(adapted, plan, folder, metrics is not None and metrics.settings.quantization_corrected)
    return adapted.eval()


def use_template_of(folder: str | Path, tokenizer: Any) -> None:
    """Give a tokenizer the chat template that an adapter was trained with, where its folder holds one.

    Raises:
        DataError: the file cannot be read, or holds no template.
    """
    template = Path(folder) / TEMPLATE_FILE
    if template.is_file():
        tokenizer.chat_template = read_template(template)


def _check_plan(model: PeftModel, plan: Plan, folder: Path, is_corrected: bool) -> None:
    """``is_corrected``: the adapters of 4-bit weights have twice the planned rank and alpha."""
    planned = {adapter.name: [(adapter.rank, adapter.alpha)] for adapter in plan.adapters}
    if is_corrected:
        planned = {name: [*pairs, *((2 * rank, 2 * alpha) for rank, alpha in pairs)] for name, pairs in planned.items()}
    found = adapted_modules(model)
    differing = sorted(name for name in planned.keys() | found.keys() if found.get(name) not in planned.get(name, []))
    if differing:
        raise AdapterError(
            f"{folder}: the adapter differs from its plan.json in {len(differing)} module(s), first {differing[0]}; "
            "the folder was changed after the run, train again or remove plan.json"
        )
