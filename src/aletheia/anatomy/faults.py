"""Turn what libraries raise about a model that somebody else made into one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from aletheia.errors import ModelError
from aletheia.kinds import near

NEEDS_CODE = (
    "{name} can only be loaded by its own code; expected a model that transformers knows; read that code, then give "
    "`trust_remote_code`"
)
LONGEST_REASON = 200  # characters
_OF_THE_PLACE = (OSError, ImportError)  # not found, not reached, not installed: the library's message says it


@contextmanager
def explained(name: str, fault: str = "its config or weights do not fit together") -> Iterator[None]:
    """Turn whatever loading raises into one line: ``fault``, and the library's message as the reason.

    Raises:
        ModelError: in place of any other exception.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # foreign configs, checkpoints and tokenizers may raise anything
        if "trust_remote_code=True" in str(error):
            raise ModelError(NEEDS_CODE.format(name=name)) from error
        if "Weights only load failed" in str(error):  # and the library advises to load it anyway
            raise ModelError(f"{name[:200]} holds a pickle with more than tensors; expected safetensors") from error
        if "does not recognize this architecture" in str(error):
            raise ModelError(
                f"cannot load {name[:200]}: the installed transformers does not know its model_type; "
                "upgrade transformers, or fetch config.json again"
            ) from error
        reason = f"{first_sentence(error)} ({type(error).__name__})"
        if "ignore_mismatched_sizes" in str(error):  # and the message points to a report that is not shown
            reason = "the shapes of the weights differ from the config"
        if isinstance(error, _OF_THE_PLACE):
            raise ModelError(f"cannot load {name[:200]}: {reason}{near(name, 'model', 'run', 'adapter')}") from error
        raise ModelError(f"cannot load {name[:200]}: {fault}: {reason}; fetch it again") from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's message, cut at a word; ``no reason given`` where it is empty."""
    text = " ".join(str(error).split())
    if not text:
        return "no reason given"
    sentence = re.split(r"(?<=[a-z)\]'\"`]{2})[.!?]\s", text, maxsplit=1)[0].rstrip(".!?")
    if len(sentence) <= LONGEST_REASON:
        return sentence
    return sentence[:LONGEST_REASON].rpartition(" ")[0] + " ..." if " " in sentence[:LONGEST_REASON] else text[:80]
