"""Special token ids: where generation stops, and what pads a batch. No torch."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

_FILES = ("generation_config.json", "config.json")


def stop_ids(tokenizer: Any, more: Collection[int] = (), vocab_size: int | None = None) -> tuple[int, ...]:
    """Ids of the tokens at which generation stops, the tokenizer's own end token first if it has one.

    The others are ``more``, and those in the model's settings in the tokenizer's folder. With ``vocab_size``, ids
    outside the embedding are dropped.
    """
    own = tokenizer.eos_token_id
    found = dict.fromkeys([*([] if own is None else [own]), *more, *_configured(str(tokenizer.name_or_path or ""))])
    return tuple(one for one in found if vocab_size is None or one < vocab_size)


def pad_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """The id that pads short rows. Padding is masked, so any id inside the embedding would do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(one for one in known if one is not None and (vocab_size is None or one < vocab_size))


def with_valid_pad(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer, or a copy with another padding token if its own is outside the embedding."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id < vocab_size:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.pad_token = tokenizer.convert_ids_to_tokens(pad_id(tokenizer, vocab_size))
    return other


def as_ids(value: object) -> tuple[int, ...]:
    """The ids in a setting that holds one, several or none."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0)


def _configured(name: str) -> tuple[int, ...]:
    """End tokens in the model's settings, from the tokenizer's folder or its place in the local cache."""
    found: list[int] = []
    for file in _FILES:
        path = _local(name, file)
        if path is None:
            continue
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # loading the model reports it
            continue
        if isinstance(held, dict):
            text = held.get("text_config")
            found += as_ids(held.get("eos_token_id"))
            found += as_ids(text.get("eos_token_id")) if isinstance(text, dict) else ()
    return tuple(found)


def _local(name: str, file: str) -> Path | None:
    if not name:
        return None
    path = Path(name)
    if path.is_dir():
        return path / file if (path / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file)
    except ValueError:  # not the name of a hub model
        return None
    return Path(cached) if isinstance(cached, str) else None
