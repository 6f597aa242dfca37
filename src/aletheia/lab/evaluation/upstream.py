"""The tasks of the installed lm-eval, on hub data or local files, with upstream's prompts, filters and versions.

Only task files of the lm-eval package are read, because their ``!function`` tags run Python.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aletheia.data.sources import one_line
from aletheia.errors import EvaluationError
from aletheia.lab.evaluation.local_data import Splits, by_subject, local_splits

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

INSTALL = "pip install 'aletheia-tune[eval]'"
FEWSHOT_SEED = 1234  # lm-eval's default, so that random examples are those of a direct run
_CONFIGS = {
    "mmlu": "mmlu/default/mmlu_*.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


def check_installed() -> None:
    """Check that lm-eval is installed.

    Raises:
        EvaluationError: it is missing or too old.
    """
    try:
        from lm_eval.tasks import _yaml_loader  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"benchmarks need lm-eval 0.4.13 or later; install it with: {INSTALL}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's log lines and progress bars, which cannot be switched off one by one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def load_tasks(
    name: str, data_dir: Path | None, num_fewshot: int | None = None, max_new_tokens: int | None = None
) -> "dict[str, ConfigurableTask]":
    """The upstream tasks of a benchmark, ready to build requests: for MMLU 57, by subject; else one, under ``""``.

    ``num_fewshot`` and ``max_new_tokens`` replace upstream's numbers. As in lm-eval, a task that is fixed at zero
    examples keeps zero. Subjects without local test rows are left out.

    Raises:
        EvaluationError: lm-eval is missing, the hub cannot be reached, there are too few examples, or a subject is
            unknown.
        DataError: a local file is missing or has other columns.
    """
    check_installed()
    configs = _configs(name)
    parts: dict[str, Splits] | None = None
    if data_dir is not None:
        splits = local_splits(name, data_dir)
        parts = by_subject(splits) if name == "mmlu" else {"": splits}
        if unknown := sorted(parts.keys() - configs.keys()):
            raise EvaluationError(f"{name} has no subject {unknown[0]!r} in lm-eval; correct {data_dir / name}")
        configs = {subject: configs[subject] for subject in parts}
    tasks = {}
    for subject, config in configs.items():
        if max_new_tokens is not None and config["output_type"] == "generate_until":
            config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
        task = _build(name, config, parts[subject] if parts else None)
        _set_fewshot(name, task, num_fewshot)
        tasks[subject] = task
    return tasks


def task_version(name: str, tasks: "dict[str, ConfigurableTask]") -> str:
    """Upstream's version of a task; for MMLU that of the group, followed by that of the subjects."""
    version = str(next(iter(tasks.values())).VERSION)
    if name != "mmlu":
        return version
    return f"{_load(_folder() / 'mmlu/default/_mmlu.yaml')['metadata']['version']} (subjects {version})"


def _folder() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


def _load(path: Path, functions: bool = True) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=functions)
    return config


def _configs(name: str) -> dict[str, dict[str, Any]]:
    """Upstream's configuration by subject."""
    configs = {}
    for path in sorted(_folder().glob(_CONFIGS[name])):
        # the functions of HumanEval load code_eval from the hub on import; it is scored elsewhere
        config = _load(path, functions=name != "humaneval")
        if name == "humaneval":
            config |= {"metric_list": [{"metric": "bypass"}], "filter_list": None}
        config.pop("tag", None)
        configs[config["dataset_name"] if name == "mmlu" else ""] = config
    return configs


def _build(name: str, config: dict[str, Any], splits: Splits | None) -> "ConfigurableTask":
    import datasets
    from lm_eval.api.task import ConfigurableTask

    if splits is not None:
        local = {split: datasets.Dataset.from_list(docs) for split, docs in splits.items()}
        absent = {key: None for key in ("training_split", "validation_split") if config.get(key) not in local}
        config |= {"custom_dataset": lambda **_: local} | absent
    try:
        with quiet():
            return ConfigurableTask(config=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if splits is not None:
            raise
        raise EvaluationError(
            f"cannot get the data of {name} from the hub ({one_line(error)}); pass local files with `data_dir`"
        ) from error


def _set_fewshot(name: str, task: "ConfigurableTask", num_fewshot: int | None) -> None:
    fixed = task.config.num_fewshot
    if fixed is None or (num_fewshot is not None and fixed != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    wanted = task.config.num_fewshot
    examples = len(task.fewshot_docs()) if wanted else 0
    if examples < wanted:
        raise EvaluationError(
            f"{name} has {examples} examples for its prompts; expected {wanted}; lower `num_fewshot` or add rows"
        )
    task.set_fewshot_seed(FEWSHOT_SEED)
