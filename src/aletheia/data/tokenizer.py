"""The identity of a tokenizer: how it splits text, and its chat template."""

import hashlib
import json
from typing import Any

from aletheia.anatomy.schema import TokenizerIdentity

_NO_INFLUENCE = ("padding", "truncation")  # state of the last call; Aletheia pads and cuts rows itself


def identify_tokenizer(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a tokenizer in its current state, its current chat template included.

    ``vocabulary`` hashes the whole tokenizer with its begin and end tokens; without a fast backend it hashes the words
    and their ids instead. The padding token does not count, because padding is masked.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = {name: value for name, value in json.loads(backend.to_str()).items() if name not in _NO_INFLUENCE}
    ends = [str(token) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    return TokenizerIdentity(
        name=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
        vocabulary=_sha256([content, ends]),
        chat_template=_sha256(getattr(tokenizer, "chat_template", None)),
    )


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
