"""Keep messages of other libraries off the terminal. Imports none of them."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# read when a library is imported, and inherited by child processes
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # bars that ignore the settings of their library
    "TOKENIZERS_PARALLELISM": "true",  # unset, each fork prints a paragraph
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
NOISY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "httpx",
    "peft",
    "torch",
    "torchao",
    "transformers",
)


def quiet_libraries() -> None:
    """Keep the bars, log lines and warnings of libraries off the terminal; their errors still raise.

    Call it before importing them: some write during the import. Variables that are already set stay as they are.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if "transformers" in sys.modules:  # already imported, so it has read its environment
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what is written to stderr, also past Python, as libraries in Rust do."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
