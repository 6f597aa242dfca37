"""Check a model folder that somebody else wrote before a library reads it: kinds of files, sizes, code, pickles.

Nothing here builds, runs or unpickles anything. Each refusal is one line.
"""

import json
import mmap
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from aletheia.anatomy.settings import Attention
from aletheia.errors import ModelError
from aletheia.settings import MOST_LAYERS, MOST_PARAMETERS, MOST_TOKENS, WIDEST

CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG = "config.json", "adapter_config.json", "generation_config.json"
CONFIG_BYTES = 10_000_000  # of a settings file; the largest known are below 1 MB
TOKENIZER_BYTES = 250_000_000  # of tokenizer.json and similar files; the largest known are below 40 MB
DEEPEST = 32  # levels of a config; real ones have 3 or 4
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_DTYPE = re.compile(r"auto|(torch\.)?(b?float16|float(32|64)|float[48]_\w+|u?int\d+|half|double|float|complex\d+|bool)")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
LONGEST, MOST_TOKEN_IDS, MOST_NAMES = (
    10_000,
    100,
    100_000,
)  # entries: of any list, of *_token_id lists, of lists of names or labels
_NAMED = re.compile(r"modules|ignore|layers")  # lists of names of weights
_LABELS, _EXPERTS = re.compile(r"^num_labels$"), re.compile(r"experts?$")
_COUNTS = re.compile(r"^(n|num)_|_(count|num)$")
_FREE = re.compile(
    r"seed|theta|param|max_length|window|version|new_tokens|flops|time|total|size_bytes"
)  # sizes of nothing
_LAYERS = re.compile(r"(^|_)(n|num|encoder|decoder|hidden|mtp|nextn)?_?(n_)?(layers?|blocks|depth)$")
_COUNTED = ("num_hidden_layers", "n_layer", "n_layers", "hidden_size", "n_embd", "d_model", "vocab_size")
_TOKENS = re.compile(r"vocab|position|n_ctx|context|seq_len|sequence_length")
_WIDTH = re.compile(r"size|dim|heads?$|rank|experts?$|width|inner|n_embd|d_model|d_ff|ffn|channels|kernel|groups")
_LIMITS = (  # by the words in a key, first match wins; each counts modules, labels or rows to build
    (_LABELS, 10_000),
    (_LAYERS, MOST_LAYERS),
    (_EXPERTS, 2**14),
    (_TOKENS, MOST_TOKENS),
    (_WIDTH, WIDEST),
)
_OTHERS = ((_FREE, None), (_COUNTS, 2**16), (re.compile(""), MOST_TOKENS))  # for whole numbers only
_GGUF_KEYS = {
    **dict.fromkeys(("block_count",), MOST_LAYERS),
    **dict.fromkeys(("embedding_length", "feed_forward_length", "head_count", "expert_count"), WIDEST),
    **dict.fromkeys(("vocab_size", "context_length"), MOST_TOKENS),
}


def check_files(folder: Path) -> None:
    """Refuse anything but files and folders (reading a pipe may never end), and settings files that are too large.

    Raises:
        ModelError: names the file.
    """
    for path in sorted(folder.iterdir()):
        try:
            found = path.stat()
        except OSError:  # a dangling link
            continue
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise ModelError(
                f"{path} is not a regular file; expected the files of a model; remove it or replace it by a copy"
            )
        if path.suffix in (".json", ".model", ".txt", ".jinja"):
            is_settings = path.name.endswith("config.json")
            most = CONFIG_BYTES if is_settings else TOKENIZER_BYTES
            if found.st_size > most:
                raise ModelError(
                    f"{path} has {found.st_size / 1e6:,.0f} MB; expected at most {most / 1e6:,.0f} MB of "
                    f"{'settings' if is_settings else 'tokens or names'}; fetch the model again"
                )


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a ``config.json`` or ``adapter_config.json``.

    Raises:
        ModelError: the file cannot be read, is too large or nested too deeply, or is not a JSON object.
    """
    found = read_json(path, "settings", CONFIG_BYTES, "fetch it again")
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected an object of settings; fetch it again")
    return found


def read_json(path: Path, what: str, most_bytes: int, remedy: str) -> Any:
    """The content of a JSON file of at most ``most_bytes``; ``what`` and ``remedy`` go into the error.

    Raises:
        ModelError: the file cannot be read, is too large or nested too deeply, or is not JSON.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file; expected JSON; {remedy}")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ModelError(f"{path} is larger than {most_bytes / 1e6:.0f} MB; expected only {what}; {remedy}")
        return json.loads(content)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, thousands of digits, deep nesting
        raise ModelError(f"{path} is not JSON of {what} ({type(error).__name__}); {remedy}") from error


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse a config whose model is too large to build, even without weights.

    Numbers are limited by the words in their keys: layers to ``MOST_LAYERS``, sizes to ``WIDEST``, tokens, positions
    and all other whole numbers to ``MOST_TOKENS``. Parameters are limited to ``MOST_PARAMETERS``, lists to ``LONGEST``
    entries. Attention code from a hub is refused, too.

    Raises:
        ModelError: names the setting, its value and what is allowed.
    """
    for key, value in _settings(config, name):
        if "attn_implementation" in key or "experts_implementation" in key:
            for one in value.values() if isinstance(value, dict) else (value,):
                if one is not None and "/" in str(one):
                    raise ModelError(
                        f"{name}: {key} is {str(one)[:80]!r}, code from a hub; expected one of "
                        f"{', '.join(get_args(Attention))}; remove it from config.json"
                    )
        if key == "transformers_weights" and value is not None and not is_plain_name(str(value), ".safetensors"):
            raise ModelError(f"{name}: {key} is {str(value)[:80]!r}; expected a .safetensors file in the folder")
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and not _DTYPE.fullmatch(value):
            raise ModelError(f"{name}: {key} is {value[:60]!r}; expected a dtype such as float32, bfloat16 or float16")
        if key == "quantization_config":
            _check_quantization(value, name)
    check_values(config, name)
    for inner in _parts(config):
        _check_parameters(inner, name)


def check_values(config: dict[str, Any], name: str) -> None:
    """Refuse numbers that are too large and lists that are too long, as in a ``generation_config.json``.

    Raises:
        ModelError: as :func:`check_config`.
    """
    for key, value in _settings(config, name):
        _check_length(key, value, name)
        for number in _flat(value):
            _check_number(key, number, name)


def base_of_adapter(folder: Path) -> str:
    """The base model that the config of a PEFT adapter names.

    Raises:
        ModelError: the config cannot be read.
    """
    return str(read_settings(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))[:200]


def found_file(name: str, file: str) -> Path | None:
    """Path of ``file`` in a folder or hub repository; None if it is missing or out of reach, and for a GGUF file."""
    if name.endswith(".gguf"):
        return None
    if (folder := Path(name)).is_dir():
        return folder / file if (folder / file).exists() else None
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(name, file, **quiet)
    return None if found is None else Path(found)


def tokenizer_files(name: str) -> list[Path]:
    """The files of a folder or hub repository from which a tokenizer may be built; empty if out of reach."""
    if (folder := Path(name)).is_dir():
        return sorted(folder.glob("tokenizer*.json"))
    found = found_file(name, "tokenizer.json")
    return [] if found is None else [found]


def needs_code(config: dict[str, Any]) -> bool:
    """Whether only code that comes with the model can build it: it names a class that transformers does not know."""
    from transformers import CONFIG_MAPPING

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def check_index(path: Path, allow_pickle: bool) -> None:
    """Refuse an index of shards that points outside its folder, or to pickles that are not allowed.

    Raises:
        ModelError: names the shard.
    """
    try:
        if path.stat().st_size > TOKENIZER_BYTES:
            raise ModelError(f"{path} is larger than {TOKENIZER_BYTES / 1e6:.0f} MB; fetch it again")
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; fetch it again") from error
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} is not an index of shards ({type(error).__name__}); fetch it again") from error
    for shard in sorted(map(str, shards)):
        if not is_plain_name(shard, "") or (not allow_pickle and not shard.endswith(".safetensors")):
            raise ModelError(f"{path} names the shard {shard[:80]!r}; expected a .safetensors file in its folder")


def stored_bytes(path: Path, allow_pickle: bool) -> int | None:
    """Bytes of the weights in a folder or file; None for anything else, such as a hub id.

    Raises:
        ModelError: they are pickles, which are not allowed, or their index points elsewhere.
    """
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else None
    files = sorted(file for file in path.iterdir() if file.is_file())
    pickles = [file for file in files if file.suffix in PICKLES and not file.name.startswith(_NO_WEIGHTS)]
    safe = [file for file in files if file.suffix == ".safetensors"]
    if pickles and not safe and not allow_pickle:
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run code when it is read; expected safetensors; if you trust "
            "its author, give `allow_pickle`"
        )
    for index in path.glob("*.index.json"):
        check_index(index, allow_pickle)
    return sum(file.stat().st_size for file in (*safe, *pickles))


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header names sizes that no model has.

    Raises:
        ModelError: names the setting.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for key, most in _GGUF_KEYS.items():
                    at = content.find(f".{key}".encode(), 0, TOKENIZER_BYTES)
                    value = int.from_bytes(content[at + len(key) + 5 : at + len(key) + 9], "little") if at >= 0 else 0
                    if value > most:
                        raise ModelError(f"{path}: {key} is {value:,}; expected at most {most:,}; fetch it again")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch it again") from error


def is_plain_name(name: str, ending: str) -> bool:
    """Whether a name is a plain file name, without a folder, with this ending."""
    return name == Path(name).name and name not in ("", ".", "..") and "\\" not in name and name.endswith(ending)


def _check_quantization(found: Any, name: str) -> None:
    """Refuse unknown methods: transformers would read their packed weights as if they were plain."""
    if found is None or (not isinstance(found, dict) and hasattr(found, "quant_method")):
        return
    if not isinstance(found, dict):
        raise ModelError(f"{name}: quantization_config is {str(found)[:60]!r}; expected an object with quant_method")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = found.get("quant_method")
    method = str(getattr(method, "value", method))
    is_old = method == "None" and (found.get("load_in_4bit") or found.get("load_in_8bit"))
    if not is_old and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ModelError(
            f"{name}: quantization_config has quant_method {method[:80]!r}, which transformers does not know; "
            f"expected one of {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )


def _settings(config: dict[str, Any], name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every setting at every level except class labels."""
    if depth > DEEPEST:
        raise ModelError(f"{name}: its config is nested more than {DEEPEST} levels deep; fetch it again")
    for key, value in config.items():
        if key in ("id2label", "label2id"):
            if isinstance(value, dict | list) and len(value) > MOST_NAMES:
                raise ModelError(f"{name}: {key} has {len(value):,} labels; expected at most {MOST_NAMES:,}")
        elif key != "task_specific_params":
            for inner in value if isinstance(value, list) else ():
                _check_nesting(inner, name, depth + 1)
            yield str(key), value
            for inner in _flat(value):
                if isinstance(inner, dict):
                    yield from _settings(inner, name, depth + 1)


def _check_nesting(value: Any, name: str, depth: int) -> None:
    if depth > DEEPEST:
        raise ModelError(f"{name}: its config is nested more than {DEEPEST} levels deep; fetch it again")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_nesting(inner, name, depth + 1)


def _flat(value: Any) -> Iterator[Any]:
    """The items of nested lists; their depth is checked before."""
    for inner in value if isinstance(value, list) else ():
        yield from _flat(inner)
    if not isinstance(value, list):
        yield value


def _check_length(key: str, value: Any, name: str) -> None:
    """Check a list and the lists inside it."""
    most = MOST_TOKEN_IDS if key.endswith("_token_id") else MOST_NAMES if _NAMED.search(key) else LONGEST
    if isinstance(value, list):
        if len(value) > most:
            raise ModelError(f"{name}: {key} has {len(value):,} entries; expected at most {most:,}; fetch it again")
        for inner in value:
            _check_length(key, inner, name)


def _check_number(key: str, value: Any, name: str) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if key in _COUNTED and value is not None and not is_count:
        shown = repr(value)[:60]
        raise ModelError(f"{name}: {key} is {shown}; expected a whole number of at least 1; fetch config.json again")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for words, most in (*_LIMITS, *(_OTHERS if isinstance(value, int) else ())):
        if words.search(key):
            if most is not None and not value <= most:  # NaN, too
                raise ModelError(f"{name}: {key} is {value:,}; expected at most {most:,}; fetch config.json again")
            return


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _check_parameters(config: dict[str, Any], name: str) -> None:
    """A lower bound from the width of the layers; everything else only adds to it."""

    def first(*keys: str) -> int:
        found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
        return int(found)

    width, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "n_layers")
    inner = first("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim")
    experts = max(1, first("num_experts", "num_local_experts", "n_routed_experts"))
    total = first("vocab_size") * width + layers * width * (2 * width + 2 * inner * experts)
    if total > MOST_PARAMETERS:
        raise ModelError(
            f"{name}: its config implies {total:.1e} parameters; expected at most {MOST_PARAMETERS:.0e}; "
            "fetch config.json again"
        )
