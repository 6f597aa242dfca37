"""An adapter that was saved, put back on its base model."""

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from aletheia.adapters.adapt import adapted_modules
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.schema import TokenizerIdentity
from aletheia.data.sources import one_line
from aletheia.errors import AdapterError, ArtifactError
from aletheia.planning.plan import Plan
from aletheia.runs.contents import check_contents
from aletheia.runs.manifest import MANIFEST_FILE
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, Metrics


def load_adapter(model: nn.Module, folder: str | Path, tokenizer: TokenizerIdentity | None = None) -> PeftModel:
    """Put the adapter of a run folder, or of any PEFT adapter folder, on its base model, frozen and in eval mode.

    ``tokenizer`` is the one that it will be used with, from :func:`aletheia.data.tokenizer.identify_tokenizer`.

    Raises:
        PlanError: the run was made on another base model.
        AdapterError: there is no adapter, its modules, shapes or weights do not fit the model, or the run learned with
            another tokenizer.
        ArtifactError: a file of the run was changed since it was written.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} holds no adapter_config.json; expected a run folder or a PEFT adapter folder")
    if isinstance(model, PeftModel):
        raise AdapterError("the model carries an adapter already; expected a base model (merge or unload it first)")
    plan = Plan.read(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    metrics = None
    if plan is not None:
        plan.check_model(identify(model))
        metrics = _checked_metrics(folder, tokenizer)
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
        _check_plan(adapted, plan, folder, metrics is not None and metrics.settings.quantization_corrected)
    return adapted.eval()


def _checked_metrics(folder: Path, tokenizer: TokenizerIdentity | None) -> Metrics | None:
    """The metrics of a run whose files are as it left them; None where only plan and adapter were taken along."""
    if not (folder / METRICS_FILE).is_file():
        return None
    metrics = Metrics.read(folder / METRICS_FILE)
    if not (folder / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST_FILE}; expected the run as it was written, put it back")
    check_contents(folder)
    metrics.check_tokenizer(tokenizer)
    return metrics


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
