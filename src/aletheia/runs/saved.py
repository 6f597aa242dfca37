"""An adapter that was saved, put back on its base model: to be used, merged, or trained on."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from aletheia.adapters.adapt import adapted_modules
from aletheia.adapters.saved_config import as_stored, not_trained_here, read_lora_config
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.foreign import ADAPTER_CONFIG, read_settings
from aletheia.anatomy.load import quantization_of
from aletheia.anatomy.schema import ModelIdentity, TokenizerIdentity
from aletheia.data.sources import one_line
from aletheia.data.templates import read_template, use_template
from aletheia.errors import AdapterError, ArtifactError
from aletheia.files import whole_path
from aletheia.planning.make import plan_of_adapters
from aletheia.planning.plan import Plan, PlanSettings
from aletheia.probing.scores import Scores
from aletheia.runs.contents import check_contents
from aletheia.runs.manifest import MANIFEST_FILE
from aletheia.runs.schema import METRICS_FILE, PLAN_FILE, Metrics

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"  # as tokenizers are saved


def load_adapter(
    model: nn.Module, folder: str | Path, allow_pickle: bool = False, tokenizer: TokenizerIdentity | None = None
) -> PeftModel:
    """Put the adapter of a run folder, or of any PEFT adapter folder, on its base model, frozen and in eval mode.

    Args:
        model: the base model, which is modified in place.
        folder: where the adapter lies; its config is checked before PEFT sees it.
        allow_pickle: read ``adapter_model.bin``, with torch's ``weights_only``.
        tokenizer: the one that it will be used with, from :func:`aletheia.data.tokenizer.identify_tokenizer`.

    Raises:
        PlanError: the run was made on another base model.
        AdapterError: there is no adapter, it is not plain LoRA, its modules, shapes or weights do not fit the model, or
            the run learned with another tokenizer.
        ArtifactError: a file of the run was changed since it was written.
    """
    return _put_on(model, Path(folder), allow_pickle, is_trainable=False, tokenizer=tokenizer).eval()


def continue_adapter(
    model: nn.Module, folder: str | Path, allow_pickle: bool = False, tokenizer: TokenizerIdentity | None = None
) -> PeftModel:
    """The same, ready to be trained on: as ``PeftModel.from_pretrained(..., is_trainable=True)`` leaves it.

    Raises:
        PlanError: as :func:`load_adapter`.
        AdapterError: as :func:`load_adapter`, or it has parts beside plain LoRA, or a frozen part.
    """
    folder = Path(folder)
    adapted = _put_on(model, folder, allow_pickle, is_trainable=True, tokenizer=tokenizer)
    beside = not_trained_here(_config(adapted))
    if beside is not None:
        raise AdapterError(
            f"{folder} has `{beside}`, which is not trained here; expected plain LoRA; `fresh` merges it into its base"
        )
    if (folder / METRICS_FILE).is_file() and Metrics.read(folder / METRICS_FILE).settings.quantization_corrected:
        raise AdapterError(f"half of each rank of {folder} is a frozen correction of NF4; expected a plain adapter")
    return adapted


def merge_adapter(
    model: nn.Module,
    folder: str | Path,
    allow_pickle: bool = False,
    tokenizer: TokenizerIdentity | None = None,
    identity: ModelIdentity | None = None,
) -> PreTrainedModel:
    """The base model with the adapter added to its weights, named after the adapter.

    Args:
        model: the base model, which is modified in place.
        folder: as for :func:`load_adapter`.
        allow_pickle: as there.
        tokenizer: as there.
        identity: what model it is, where its quantized weights were made plain.

    Raises:
        PlanError: as :func:`load_adapter`.
        AdapterError: as :func:`load_adapter`, or the base is quantized, which adding would change.
    """
    if (kind := quantization_of(model)) is not None:
        raise AdapterError(
            f"the base of {folder} is quantized ({kind}); expected plain weights to merge an adapter into"
        )
    adapted = _put_on(model, Path(folder), allow_pickle, False, tokenizer, identity).eval()
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # of weights that are not finite
        raise AdapterError(f"{folder} cannot be merged: {one_line(error)}; expected finite weights") from error
    merged.config._name_or_path = merged.name_or_path = whole_path(str(folder))
    return merged


def plan_of_adapter(model: PeftModel, scores: Scores) -> Plan:
    """The plan that an adapter of another program amounts to.

    Raises:
        AdapterError: it adapts something outside the layers.
    """
    config = _config(model)
    settings = PlanSettings(
        policy="uniform",
        percent=100,
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        freeze_after=0.0,
    )
    return plan_of_adapters(scores, settings, adapted_modules(model))


def _config(model: PeftModel) -> LoraConfig:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig), "what is put on a model here is LoRA"
    return config


def _put_on(
    model: nn.Module,
    folder: Path,
    allow_pickle: bool,
    is_trainable: bool,
    tokenizer: TokenizerIdentity | None,
    identity: ModelIdentity | None = None,
) -> PeftModel:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"{folder} holds no {ADAPTER_CONFIG}; expected a run folder or a PEFT adapter folder")
    if isinstance(model, PeftModel):
        raise AdapterError("the model carries an adapter already; expected a base model (merge or unload it first)")
    plan = Plan.read(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    metrics = None
    if plan is not None:
        plan.check_model(identity or identify(model))
        metrics = _checked_metrics(folder, tokenizer)
    config = as_stored(read_lora_config(folder, allow_pickle), folder, model)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or config.base_model_name_or_path
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        stored = set(load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # a foreign folder: PEFT raises whatever its parts raise
        if "Weights only load failed" in str(error):  # and advises to run it
            raise AdapterError(f"{folder} holds a pickle of more than tensors; expected safetensors") from error
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
    if is_trainable and (beside := sorted(stored - expected)):
        raise AdapterError(
            f"{folder} holds {beside[0]} beside its adapter, which would be lost; expected plain LoRA; `fresh` "
            "merges it"
        )
    if plan is not None:
        _check_plan(adapted, plan, folder, metrics is not None and metrics.settings.quantization_corrected)
    return adapted


def use_template_of(folder: str | Path, tokenizer: Any) -> None:
    """Give a tokenizer the chat template that an adapter was trained with, where its folder holds one.

    Raises:
        DataError: the file cannot be read, or holds no template.
    """
    if (file := template_file(Path(folder))) is not None:
        use_template(tokenizer, read_template(file))


def template_file(folder: Path) -> Path | None:
    """The file of an adapter folder that holds its chat template; None where there is none.

    Raises:
        ModelError: the settings of its tokenizer cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return folder / TEMPLATE_FILE
    settings = folder / TOKENIZER_CONFIG  # of older releases of transformers
    return settings if settings.is_file() and read_settings(settings).get("chat_template") else None


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
