"""What tells one tokenizer from another: what becomes of a text, and what a chat template makes of messages."""

import hashlib
import json
from typing import Any

from aletheia.anatomy.schema import TokenizerIdentity

_NO_INFLUENCE = ("padding", "truncation")  # state of the last call; rows are padded and cut elsewhere


def identify_tokenizer(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a tokenizer as it is now, with the chat template that was put on it.

    ``vocabulary`` hashes the whole tokenizer with its begin and end tokens; where it has no fast backend, its words
    with their numbers. The padding token does not count: padding is masked.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        told: Any = sorted(tokenizer.get_vocab().items())
    else:
        told = {name: value for name, value in json.loads(backend.to_str()).items() if name not in _NO_INFLUENCE}
    ends = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    return TokenizerIdentity(
        name=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
        vocabulary=_sha256([told, ends]),
        chat_template=_sha256(getattr(tokenizer, "chat_template", None)),
    )


def _sha256(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
