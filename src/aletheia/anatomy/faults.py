"""What libraries raise over a model that somebody else made, as one line of ours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from aletheia.errors import ModelError
from aletheia.kinds import near

NEEDS_CODE = (
    "{name} can only be loaded by code of its own; expected a model that transformers knows, or `trust_remote_code` "
    "once you have read that code"
)
LONGEST_REASON = 200  # characters
_OF_THE_PLACE = (OSError, ImportError)  # not found, not reached, not installed: the library's own words are right


@contextmanager
def explained(name: str, fault: str = "its config or weights do not fit together") -> Iterator[None]:
    """Turn whatever loading raises into one line: ``fault``, and what the library says as the reason.

    Raises:
        ModelError: instead of all else.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # configs, checkpoints and tokenizers are foreign data: anything may be raised
        if "trust_remote_code=True" in str(error):
            raise ModelError(NEEDS_CODE.format(name=name)) from error
        if "Weights only load failed" in str(error):  # and advises to run it
            raise ModelError(f"{name[:200]} holds a pickle of more than tensors; expected safetensors") from error
        if "does not recognize this architecture" in str(error):
            raise ModelError(
                f"cannot load {name[:200]}: the installed transformers does not know its model_type; "
                "upgrade transformers, or fetch config.json again"
            ) from error
        reason = f"{first_sentence(error)} ({type(error).__name__})"
        if "ignore_mismatched_sizes" in str(error):  # and points to a report that nobody sees
            reason = "weights are of another shape than the config tells"
        if isinstance(error, _OF_THE_PLACE):
            raise ModelError(f"cannot load {name[:200]}: {reason}{near(name, 'model', 'run', 'adapter')}") from error
        raise ModelError(f"cannot load {name[:200]}: {fault}: {reason}; fetch it again") from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of what a library says, cut at a word; ``no reason given`` where it says nothing."""
    told = " ".join(str(error).split())
    if not told:
        return "no reason given"
    sentence = re.split(r"(?<=[a-z)\]'\"`]{2})[.!?]\s", told, maxsplit=1)[0].rstrip(".!?")
    if len(sentence) <= LONGEST_REASON:
        return sentence
    return sentence[:LONGEST_REASON].rpartition(" ")[0] + " ..." if " " in sentence[:LONGEST_REASON] else told[:80]
