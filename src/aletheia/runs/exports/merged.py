"""A complete model folder: the base with the adapter added to its weights, with tokenizer and chat template."""

from dataclasses import replace

from transformers import PreTrainedModel

from aletheia.anatomy.device_memory import free_memory_bytes
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.load import DTYPES, Loaded, inspect, load, load_config, quantization_of
from aletheia.data.sources import one_line
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import ModelError
from aletheia.runs.exports.origin import Origin
from aletheia.runs.exports.written import Task, Written
from aletheia.runs.saved import merge_adapter, use_template_of

SPARE = 1.1  # memory that merging takes, as a multiple of the weights


def write_merged(task: Task) -> Written:
    """Write config, weights, tokenizer, chat template and generation settings.

    Weights that were quantized in training are quantized again and stored as plain numbers, because the adapter learned
    on these values.

    Raises:
        ModelError: the base cannot be loaded, takes more memory than is free, or cannot be dequantized.
        AdapterError, PlanError: the adapter does not fit the base.
    """
    name = _dtype(task)
    _check_memory(task, DTYPES[name].itemsize)
    base = _load(task, name)
    identity = identify(base.model)
    base, notes = _plain(base, task.origin)
    use_template_of(task.source, base.tokenizer)
    tokenizer = identify_tokenizer(base.tokenizer)
    model = merge_adapter(base.model, task.source, task.allow_pickle, tokenizer, identity)
    model.config._name_or_path = ""  # the merged model no longer depends on the base
    model.save_pretrained(task.folder)
    base.tokenizer.save_pretrained(task.folder)
    return Written(f"transformers.{type(model).__name__}.from_pretrained({str(task.out)!r})", notes)


def _dtype(task: Task) -> str:
    """Name of the dtype to merge and save in: the requested one, else the checkpoint's, else the run's."""
    if task.dtype != "auto":
        if task.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {task.dtype!r}; expected auto, {', '.join(DTYPES)}")
        return task.dtype
    stored = getattr(load_config(task.origin.base, task.trust_remote_code), "dtype", None)
    named = next((name for name, dtype in DTYPES.items() if dtype == stored), None)
    settings = task.origin.settings
    return named or (settings.dtype if settings and settings.dtype in DTYPES else "float32")


def _check_memory(task: Task, value_bytes: int) -> None:
    needed = int(inspect(task.origin.base, task.trust_remote_code).parameters * value_bytes * SPARE)
    available = free_memory_bytes()
    if needed > available:
        raise ModelError(
            f"merging into {task.origin.base} takes {needed / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are "
            "free; set a smaller `dtype`, or merge on a larger machine"
        )


def _load(task: Task, dtype: str) -> Loaded:
    settings = task.origin.settings
    again = settings.quantization if settings and settings.quantization in ("nf4", "int8") else None
    return load(
        task.origin.base,
        dtype,
        "cpu",
        again,  # type: ignore[arg-type]  # one of the two
        trust_remote_code=task.trust_remote_code,
        allow_pickle=task.allow_pickle,
    )


def _plain(base: Loaded, origin: Origin) -> tuple[Loaded, tuple[str, ...]]:
    """The base with plain weights, and notes about it."""
    kind = quantization_of(base.model)
    if kind is None:
        return base, ()
    dtype = base.model.dtype
    try:
        model: PreTrainedModel = base.model.dequantize().to(dtype)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{origin.base} is quantized ({kind}) and cannot be dequantized ({one_line(error)}); expected "
            "bitsandbytes or plain weights; set `base` to the plain model"
        ) from error
    return replace(base, model=model), (f"the weights hold the {kind} values that the adapter learned on, as {dtype}",)
