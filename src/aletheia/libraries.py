"""What the libraries beneath say by themselves, kept off the terminal. Imports none of them."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# read when a library is imported, and inherited by processes that are started
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # bars that are drawn past the settings of their library
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

    Call it before they are imported: some speak while they are. What the environment says already stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if "transformers" in sys.modules:  # imported before, it has read its environment
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what is written to the standard error stream off the terminal: libraries in Rust write past Python."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
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
