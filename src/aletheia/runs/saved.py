"""Load a saved adapter onto its base model: to use it, merge it, or train it further."""

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

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"  # as transformers names them


def load_adapter(
    model: nn.Module, folder: str | Path, allow_pickle: bool = False, tokenizer: TokenizerIdentity | None = None
) -> PeftModel:
    """Load the adapter of a run folder, or of any PEFT adapter folder, onto its base model, frozen and in eval mode.

    Args:
        model: the base model, which is modified in place.
        folder: the adapter folder; its config is checked before PEFT sees it.
        allow_pickle: read ``adapter_model.bin``, with torch's ``weights_only``.
        tokenizer: identity of the tokenizer in use, from :func:`aletheia.data.tokenizer.identify_tokenizer`.

    Raises:
        PlanError: the run was made on another base model.
        AdapterError: there is no adapter, it is not plain LoRA, it does not fit the model, or it was trained with
            another tokenizer.
        ArtifactError: a file of the run was changed since it was written.
    """
    return _put_on(model, Path(folder), allow_pickle, is_trainable=False, tokenizer=tokenizer).eval()


def continue_adapter(
    model: nn.Module, folder: str | Path, allow_pickle: bool = False, tokenizer: TokenizerIdentity | None = None
) -> PeftModel:
    """Like :func:`load_adapter`, but ready to train further, as with PEFT's ``is_trainable=True``.

    Raises:
        PlanError: as in :func:`load_adapter`.
        AdapterError: as in :func:`load_adapter`; or the adapter has parts besides plain LoRA, or a frozen part.
    """
    folder = Path(folder)
    adapted = _put_on(model, folder, allow_pickle, is_trainable=True, tokenizer=tokenizer)
    beside = not_trained_here(_config(adapted))
    if beside is not None:
        raise AdapterError(
            f"{folder} has `{beside}`, which aletheia does not train; expected plain LoRA; set `fresh` to merge it "
            "into its base"
        )
    if (folder / METRICS_FILE).is_file() and Metrics.read(folder / METRICS_FILE).settings.quantization_corrected:
        raise AdapterError(
            f"half of each rank of {folder} is a frozen correction of NF4; expected a plain adapter; train one without "
            "`correct_quantization`"
        )
    return adapted


def merge_adapter(
    model: nn.Module,
    folder: str | Path,
    allow_pickle: bool = False,
    tokenizer: TokenizerIdentity | None = None,
    identity: ModelIdentity | None = None,
) -> PreTrainedModel:
    """Add the adapter to the weights of the base model, and name the model after the adapter.

    Args:
        model: the base model, which is modified in place.
        folder: as in :func:`load_adapter`.
        allow_pickle: as in :func:`load_adapter`.
        tokenizer: as in :func:`load_adapter`.
        identity: identity of the quantized model, if ``model`` is its dequantized form.

    Raises:
        PlanError: as in :func:`load_adapter`.
        AdapterError: as in :func:`load_adapter`; or the base is quantized, or the merged weights are not finite.
    """
    if (kind := quantization_of(model)) is not None:
        raise AdapterError(
            f"the base of {folder} is quantized ({kind}); expected plain weights to merge the adapter into; load the "
            "base without quantization"
        )
    adapted = _put_on(model, Path(folder), allow_pickle, False, tokenizer, identity).eval()
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # weights that are not finite
        raise AdapterError(f"{folder} cannot be merged: {one_line(error)}; expected finite weights") from error
    merged.config._name_or_path = merged.name_or_path = whole_path(str(folder))
    return merged


def plan_of_adapter(model: PeftModel, scores: Scores) -> Plan:
    """The plan that describes an adapter of another program.

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
    assert isinstance(config, LoraConfig), "expected LoRA"
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
        raise AdapterError("the model has an adapter already; expected a base model; merge or unload it first")
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
    except Exception as error:  # a foreign folder: PEFT may raise anything
        if "Weights only load failed" in str(error):  # torch's message advises to run it
            raise AdapterError(
                f"{folder} holds a pickle of more than tensors, which may run code; expected safetensors; save the "
                "adapter again with PEFT"
            ) from error
        raise AdapterError(
            f"{folder} does not fit this model ({one_line(error)}); expected an adapter trained on this base model"
        ) from error
    # PEFT ignores weights without a module and modules without a weight; embeddings may be stored with them
    lost = {name for name in stored - expected if ".lora_" in name}
    if absent := sorted((expected - stored) | lost):
        raise AdapterError(
            f"{folder} does not fit this model: {len(absent)} weight(s) are only in one of them, first {absent[0]}; "
            "expected an adapter trained on this base model"
        )
    if is_trainable and (beside := sorted(stored - expected)):
        raise AdapterError(
            f"{folder} holds {beside[0]} as well as its adapter, which would be lost; expected plain LoRA; set `fresh` "
            "to merge it"
        )
    if plan is not None:
        _check_plan(adapted, plan, folder, metrics is not None and metrics.settings.quantization_corrected)
    return adapted


def use_template_of(folder: str | Path, tokenizer: Any) -> None:
    """Give a tokenizer the chat template that an adapter was trained with, if its folder holds one.

    Raises:
        DataError: the file cannot be read, or holds no template.
        ModelError: the settings of its tokenizer cannot be read.
    """
    if (file := template_file(Path(folder))) is not None:
        use_template(tokenizer, read_template(file))


def template_file(folder: Path) -> Path | None:
    """The file of an adapter folder that holds its chat template; None if there is none.

    Raises:
        ModelError: the settings of its tokenizer cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return folder / TEMPLATE_FILE
    settings = folder / TOKENIZER_CONFIG  # where older releases of transformers store it
    return settings if settings.is_file() and read_settings(settings).get("chat_template") else None


def _checked_metrics(folder: Path, tokenizer: TokenizerIdentity | None) -> Metrics | None:
    """The metrics of a run, after its files are checked; None if only its plan and adapter were copied."""
    if not (folder / METRICS_FILE).is_file():
        return None
    metrics = Metrics.read(folder / METRICS_FILE)
    if not (folder / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST_FILE}; expected all files of the run; restore it")
    check_contents(folder)
    metrics.check_tokenizer(tokenizer)
    return metrics


def _check_plan(model: PeftModel, plan: Plan, folder: Path, is_corrected: bool) -> None:
    """Check the adapter against its plan; if ``is_corrected``, it may have twice the planned rank and alpha."""
    planned = {adapter.name: [(adapter.rank, adapter.alpha)] for adapter in plan.adapters}
    if is_corrected:
        planned = {name: [*pairs, *((2 * rank, 2 * alpha) for rank, alpha in pairs)] for name, pairs in planned.items()}
    found = adapted_modules(model)
    differing = sorted(name for name in planned.keys() | found.keys() if found.get(name) not in planned.get(name, []))
    if differing:
        raise AdapterError(
            f"{folder}: the adapter differs from its plan.json in {len(differing)} module(s), first {differing[0]}; "
            "expected the folder as the run wrote it; train again or remove plan.json"
        )
