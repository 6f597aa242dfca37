"""Run an evaluation: prepare tasks, answer missing items, write ``items.parquet`` and ``eval.json``."""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aletheia.anatomy.access import input_weight, stop_ids_of, text_config
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.foreign import ADAPTER_CONFIG, base_of_adapter
from aletheia.anatomy.load import Loaded
from aletheia.anatomy.schema import ModelIdentity
from aletheia.data.encode import load_data
from aletheia.data.stops import with_valid_pad
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import ArtifactError, EvaluationError, SandboxError
from aletheia.files import check_writable, file_sha256, package_versions
from aletheia.lab.evaluation import humaneval, sandbox
from aletheia.lab.evaluation.journal import JOURNAL_FILE, Journal, OtherEvaluationError
from aletheia.lab.evaluation.local_data import FILES, data_hashes
from aletheia.lab.evaluation.measures import MEASURES, summarise
from aletheia.lab.evaluation.record import (
    EVAL_FILE,
    ITEMS_FILE,
    PACKAGES,
    EvalSeconds,
    EvalSettings,
    Evaluated,
    Evaluation,
    TaskResult,
    adapter_sha256,
    is_finished,
)
from aletheia.lab.evaluation.row_loss import HeldOut
from aletheia.lab.evaluation.upstream import check_installed, load_tasks, quiet
from aletheia.lab.evaluation.work import Benchmark, Row, Score, Work
from aletheia.progress import Progress, Stderr
from aletheia.runs.saved import load_adapter, use_template_of
from aletheia.settings import LONGEST_ROW, MOST_ROWS

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

TASKS = tuple(MEASURES)


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: its identity before it got an adapter, and the seconds that loading took."""

    identity: ModelIdentity
    load_seconds: float = 0.0


def eval_settings(data_dir: Path | None, adapter: Path | None, **settings: Any) -> EvalSettings:
    """Settings with the hashes of all local files that affect the result: data and adapter.

    Raises:
        EvaluationError: an unknown or repeated task, a number out of range, or only one of ``heldout`` and its file.
        DataError: a data file is missing.
        ArtifactError: ``adapter`` holds no adapter.
    """
    names, model = tuple(settings.pop("tasks")), str(settings.get("model", ""))
    if (Path(model) / ADAPTER_CONFIG).is_file():
        base = base_of_adapter(Path(model))
        raise EvaluationError(
            f"{model} is an adapter of the base model {base}; expected the base as MODEL and the adapter as an option: "
            f"aletheia eval {base} `adapter={model}` ..."
        )
    if unknown := [name for name in names if name not in TASKS]:
        raise EvaluationError(f"unknown task {unknown[0]!r} in `tasks`; expected some of {','.join(TASKS)}")
    if not names or len(set(names)) < len(names):
        raise EvaluationError(
            f"`tasks` names {'a task twice' if names else 'no task'}; expected some of {','.join(TASKS)}"
        )
    if ("heldout" in names) != (settings.get("eval_data") is not None):
        raise EvaluationError("the task heldout and `eval_data` belong together; give both or neither")
    for name, least, most in (
        ("limit", 1, 10**9), ("num_fewshot", 0, 1000), ("max_new_tokens", 1, LONGEST_ROW), ("batch_size", 1, MOST_ROWS),
        ("context_length", 1, LONGEST_ROW),
    ):  # fmt: skip
        if (value := settings.get(name)) is not None and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            raise EvaluationError(f"`{name}` is {value}; expected {bound}")
    if any(name in FILES for name in names):
        check_installed()
    hashes = {} if data_dir is None else {k: v for name in names for k, v in data_hashes(name, data_dir).items()}
    held_out = settings.get("eval_data")
    if held_out is not None and Path(held_out).is_file():
        hashes[Path(held_out).name] = file_sha256(Path(held_out))
    if adapter is not None:
        settings |= {"adapter": str(adapter), "adapter_sha256": adapter_sha256(adapter)}
    return EvalSettings(tasks=names, data_sha256=hashes, **settings)


def claim(out: Path, settings: EvalSettings, overwrite: bool = False) -> Evaluated | None:
    """Check the output folder before anything is loaded; return its finished evaluation if the settings are equal.

    Raises:
        EvaluationError: the folder holds a finished evaluation with other settings, and ``overwrite`` is off.
        ArtifactError: ``out`` is a file, holds something else, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; expected a folder for the evaluation; choose another `out`")
    ours = is_finished(out) or (out / JOURNAL_FILE).is_file()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise ArtifactError(f"{out} holds other files; expected a new or empty folder; choose another `out`")
    if is_finished(out) and not overwrite:
        finished = Evaluated.read(out)
        difference = settings.first_difference(finished.evaluation.settings)
        if difference:
            raise OtherEvaluationError(
                f"{out} holds another evaluation ({difference}); choose another `out` or pass `overwrite`"
            )
        return finished
    check_writable(out)
    return None


def with_adapter(base: Loaded, adapter: str | Path, settings: EvalSettings, allow_pickle: bool = False) -> Loaded:
    """A base model with an adapter on it, and with the adapter's chat template.

    Raises:
        AletheiaError: as :func:`aletheia.load_adapter`.
    """
    use_template_of(adapter, base.tokenizer)
    tokenizer = identify_tokenizer(base.tokenizer)
    if not settings.chat and settings.eval_data is None:
        tokenizer = tokenizer.without_template()
    model: Any = load_adapter(base.model, adapter, allow_pickle, tokenizer)
    return replace(base, model=model)


def evaluate(
    base: Loaded,
    settings: EvalSettings,
    out: str | Path,
    data_dir: Path | None = None,
    origin: Origin | None = None,
    unsafe_exec: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Evaluated:
    """Evaluate a model; resume if a call with the same settings was interrupted.

    Args:
        base: the model, with its adapter if there is one, and its tokenizer.
        settings: from :func:`eval_settings`.
        out: the folder to write.
        data_dir: folder of local benchmark files; by default they come from the hub.
        origin: identity of the base model, from before it got an adapter.
        unsafe_exec: run HumanEval's programs without a sandbox if there is none.
        overwrite: replace another evaluation in ``out``.
        show_progress: print the progress of each task to stderr.

    Raises:
        EvaluationError: ``out`` holds another evaluation, lm-eval is missing, or a value is not finite.
        DataError: a data file is missing or malformed.
        ArtifactError: ``out`` cannot be written.
    """
    out = Path(out)
    if (finished := claim(out, settings, overwrite)) is not None:
        return finished
    origin = origin or Origin(identify(base.model))
    identity, tokenizer = origin.identity, identify_tokenizer(base.tokenizer)
    started = time.perf_counter()
    works = _prepare(base, settings, data_dir, unsafe_exec)
    dtype, device = str(base.model.dtype).removeprefix("torch."), str(base.model.device)
    packages = package_versions(PACKAGES)
    if overwrite:
        for name in (EVAL_FILE, ITEMS_FILE, JOURNAL_FILE):
            (out / name).unlink(missing_ok=True)
    journal = Journal(
        out,
        {
            "settings": settings.model_dump(mode="json"),
            "model": {"fingerprint": identity.fingerprint, "weights": identity.weights, "dtype": dtype},
            "tokenizer": tokenizer.model_dump(mode="json", exclude={"name"}),
            "packages": packages,
            "prompts": {work.name: work.prompts_sha256 for work in works},
        },
    )
    for work in works:
        _answer_missing(work, journal, show_progress)
    results, rows = [], []
    for work in works:
        found = work.rows([journal.answers[work.name, at] for at in range(len(work))])
        rows += found
        results.append(_result(work, found))
    _write_items(out / ITEMS_FILE, rows)
    evaluation = Evaluation(
        model=identity,
        tokenizer=tokenizer,
        settings=settings,
        dtype=dtype,
        device=device,
        packages=packages,
        tasks=tuple(results),
        items_sha256=file_sha256(out / ITEMS_FILE),
        seconds=EvalSeconds(load=origin.load_seconds, eval=time.perf_counter() - started),
    )
    evaluation.write(out / EVAL_FILE)
    journal.remove()
    return Evaluated(out, evaluation)


def language_model(model: nn.Module, tokenizer: Any, batch_size: int, context_length: int | None = None) -> "HFLM":
    """lm-eval's wrapper for a loaded model, with its adapter.

    Log-probabilities are float32. By default, lm-eval leaves them and their sums in the model's dtype. In bfloat16, the
    10,000 nats of a document would be rounded to a multiple of 64, and choices of a question would tie.
    """
    check_installed()
    with quiet():
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=model,
            tokenizer=with_valid_pad(tokenizer, input_weight(model).shape[0]),
            backend="causal",
            batch_size=batch_size,
            max_length=context_length,
            softmax_dtype=torch.float32,
        )


def _prepare(base: Loaded, settings: EvalSettings, data_dir: Path | None, unsafe_exec: bool) -> list[Work]:
    works: list[Work] = []
    lm = None
    for name in settings.tasks:
        if name == "heldout":
            assert settings.eval_data is not None
            positions = getattr(text_config(base.model), "max_position_embeddings", None)
            length = min(settings.max_length, positions or settings.max_length)
            rows = load_data(
                settings.eval_data,
                base.tokenizer,
                length,
                settings.skip_unusable,
                base.vocab_size,
                stop_ids_of(base.model),
            )
            works.append(HeldOut(base.model, rows, settings.batch_size, settings.limit))
            continue
        lm = lm or language_model(base.model, base.tokenizer, settings.batch_size, settings.context_length)
        tasks = load_tasks(name, data_dir, settings.num_fewshot, settings.max_new_tokens)
        score = _scorer(unsafe_exec) if name == "humaneval" else None
        works.append(Benchmark(name, tasks, lm, settings.limit, settings.chat, score))
    return works


def _scorer(unsafe_exec: bool) -> Score:
    """A function that runs the programs of HumanEval and returns which of them pass.

    Raises:
        SandboxError: this machine has no sandbox and ``unsafe_exec`` is off; raised before anything is generated.
    """
    unsafe = False
    try:
        sandbox.check()
    except SandboxError:
        if not unsafe_exec:
            raise
        unsafe = True

    def run(docs: Sequence[Any], completions: Sequence[str]) -> Sequence[bool]:
        programs = [
            humaneval.humaneval_program(doc["task_id"], doc["prompt"], text, doc["test"], doc["entry_point"])
            for doc, text in zip(docs, completions, strict=True)
        ]
        return [outcome.passed for outcome in humaneval.score(programs, unsafe=unsafe)]

    return run


def _answer_missing(work: Work, journal: Journal, show_progress: bool) -> None:
    """Answer whole batches, even if only a part is missing: their composition affects the last digits."""
    todo = [batch for batch in work.batches() if any((work.name, at) not in journal.answers for at in batch)]
    if not todo:
        return
    done = len(work) - sum(map(len, todo))
    say = Stderr(stream=sys.stderr)  # the stream as it is now: sys.stderr is replaced to silence lm-eval's own bars
    with Progress(work.name, len(work), "items", show_progress and say, done) as progress:
        for batch in todo:
            journal.add(work.name, batch, work.answer(batch))
            progress.advance(len(batch))


def _result(work: Work, rows: Sequence[Row]) -> TaskResult:
    return TaskResult(
        name=work.name,
        version=work.version,
        num_fewshot=work.num_fewshot,
        items=len(work),
        items_available=work.items_available,
        prompts_sha256=work.prompts_sha256,
        metrics=summarise(work.name, rows),
        answers=Counter(row["prediction"] for row in rows if "loglikelihoods" in row),
    )


def _write_items(path: Path, rows: Sequence[Row]) -> None:
    """Write the items; every task has all columns, which are empty if they do not apply."""
    import pyarrow
    import pyarrow.parquet

    text, whole, number = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    columns = [("task", text), ("subject", text), ("item", whole), ("sha256", text)]
    columns += [("prediction", text), ("target", text), ("prompt_tokens", whole), ("tokens", whole)]
    columns += [("loss_sum", number), ("words", whole), ("bytes", whole)]
    columns += [(m.name, number) for measures in MEASURES.values() for m in measures if m.per is None]
    columns += [("loglikelihoods", pyarrow.list_(number))]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(columns)), temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}; choose another `out`") from error
