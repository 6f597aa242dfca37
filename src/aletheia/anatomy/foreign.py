"""A model folder that somebody else wrote, looked at before a library reads it: kinds of files, sizes, code, pickles.

Nothing here builds, runs or unpickles anything. What is refused is told in one line.
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
CONFIG_BYTES = 10_000_000  # of a file of settings; the largest seen are below 1 MB
TOKENIZER_BYTES = 250_000_000  # of tokenizer.json and what else lies beside it; the largest seen are below 40 MB
DEEPEST = 32  # levels of a config; real ones have 3 or 4
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_DTYPE = re.compile(r"auto|(torch\.)?(b?float16|float(32|64)|float[48]_\w+|u?int\d+|half|double|float|complex\d+|bool)")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
LONGEST, MOST_TOKEN_IDS, MOST_NAMES = 10_000, 100, 100_000  # entries of a list; of lists of names, of labels
_NAMED = re.compile(r"modules|ignore|layers")  # lists that name weights
_LABELS, _EXPERTS = re.compile(r"^num_labels$"), re.compile(r"experts?$")
_COUNTS = re.compile(r"^(n|num)_|_(count|num)$")
_FREE = re.compile(
    r"seed|theta|param|max_length|window|version|new_tokens|flops|time|total|size_bytes"
)  # build nothing
_LAYERS = re.compile(r"(^|_)(n|num|encoder|decoder|hidden|mtp|nextn)?_?(n_)?(layers?|blocks|depth)$")
_COUNTED = ("num_hidden_layers", "n_layer", "n_layers", "hidden_size", "n_embd", "d_model", "vocab_size")
_TOKENS = re.compile(r"vocab|position|n_ctx|context|seq_len|sequence_length")
_WIDTH = re.compile(r"size|dim|heads?$|rank|experts?$|width|inner|n_embd|d_model|d_ff|ffn|channels|kernel|groups")
_LIMITS = (  # by the words in a name, the first that fits; what is built of most is a module, a label or a row each
    (_LABELS, 10_000),
    (_LAYERS, MOST_LAYERS),
    (_EXPERTS, 2**14),
    (_TOKENS, MOST_TOKENS),
    (_WIDTH, WIDEST),
)
_OTHERS = ((_FREE, None), (_COUNTS, 2**16), (re.compile(""), MOST_TOKENS))  # of whole numbers alone
_GGUF_KEYS = {
    **dict.fromkeys(("block_count",), MOST_LAYERS),
    **dict.fromkeys(("embedding_length", "feed_forward_length", "head_count", "expert_count"), WIDEST),
    **dict.fromkeys(("vocab_size", "context_length"), MOST_TOKENS),
}


def check_files(folder: Path) -> None:
    """Refuse what is no file (a pipe would be waited for without end), and files of settings that are too large.

    Raises:
        ModelError: names the file.
    """
    for path in sorted(folder.iterdir()):
        try:
            found = path.stat()
        except OSError:  # a link to nothing
            continue
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise ModelError(
                f"{path} is no regular file; expected the files of a model; remove it or copy what it holds"
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
    """A ``config.json`` or ``adapter_config.json`` as it stands there.

    Raises:
        ModelError: it cannot be read, is too large or nested too deeply, or is no JSON object.
    """
    found = read_json(path, "settings", CONFIG_BYTES, "fetch it again")
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected an object of settings; fetch it again")
    return found


def read_json(path: Path, what: str, most_bytes: int, remedy: str) -> Any:
    """A JSON file of ``what``, of at most ``most_bytes``.

    Raises:
        ModelError: it cannot be read, is too large or nested too deeply, or is no JSON.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path} is no regular file; expected JSON; {remedy}")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ModelError(f"{path} is larger than {most_bytes / 1e6:.0f} MB; expected {what} alone; {remedy}")
        return json.loads(content)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, thousands of digits, endless nesting
        raise ModelError(f"{path} is not JSON of {what} ({type(error).__name__}); {remedy}") from error


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse a config whose model nobody can build, before it is built, even without weights.

    Of the numbers by the words in their names: layers up to ``MOST_LAYERS``, sizes up to ``WIDEST``, tokens, positions
    and whole numbers of any other name up to ``MOST_TOKENS``; and all that together up to ``MOST_PARAMETERS``. Lists
    are of ``LONGEST`` entries at most. Code of a hub's that would compute attention is refused, too.

    Raises:
        ModelError: names the setting, what it is and what it may be.
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
            raise ModelError(f"{name}: {key} is {str(value)[:80]!r}; expected a .safetensors file of the folder")
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and not _DTYPE.fullmatch(value):
            raise ModelError(f"{name}: {key} is {value[:60]!r}; expected float32, bfloat16, float16 or the like")
        if key == "quantization_config":
            _check_quantization(value, name)
    check_values(config, name)
    for inner in _parts(config):
        _check_parameters(inner, name)


def check_values(config: dict[str, Any], name: str) -> None:
    """Refuse numbers that are too large and lists that are too long, such as of a ``generation_config.json``.

    Raises:
        ModelError: as :func:`check_config`.
    """
    for key, value in _settings(config, name):
        _check_length(key, value, name)
        for number in _flat(value):
            _check_number(key, number, name)


def base_of_adapter(folder: Path) -> str:
    """What the config of a PEFT adapter names as its base.

    Raises:
        ModelError: the config cannot be read.
    """
    return str(read_settings(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))[:200]


def found_file(name: str, file: str) -> Path | None:
    """A file of a folder or hub id; None where there is none, as far as can be known, and for a GGUF file."""
    if name.endswith(".gguf"):
        return None
    if (folder := Path(name)).is_dir():
        return folder / file if (folder / file).exists() else None
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(name, file, **quiet)
    return None if found is None else Path(found)


def tokenizer_files(name: str) -> list[Path]:
    """The files of a folder or hub id from which a tokenizer may be built, as far as can be known."""
    if (folder := Path(name)).is_dir():
        return sorted(folder.glob("tokenizer*.json"))
    found = found_file(name, "tokenizer.json")
    return [] if found is None else [found]


def needs_code(config: dict[str, Any]) -> bool:
    """Whether only code that comes with the model can make it: it names a class, and transformers has none."""
    from transformers import CONFIG_MAPPING

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def check_index(path: Path, allow_pickle: bool) -> None:
    """Refuse an index of shards that leads out of its folder, or to pickles where those are not allowed.

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
        raise ModelError(f"{path} is no index of shards ({type(error).__name__}); fetch it again") from error
    for shard in sorted(map(str, shards)):
        if not is_plain_name(shard, "") or (not allow_pickle and not shard.endswith(".safetensors")):
            raise ModelError(f"{path} names the shard {shard[:80]!r}; expected a .safetensors file of its folder")


def stored_bytes(path: Path, allow_pickle: bool) -> int | None:
    """The size of the weights in a folder or file; None where there is none, such as for a hub id.

    Raises:
        ModelError: they are pickles, which are not allowed, or their index leads elsewhere.
    """
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else None
    files = sorted(file for file in path.iterdir() if file.is_file())
    pickles = [file for file in files if file.suffix in PICKLES and not file.name.startswith(_NO_WEIGHTS)]
    safe = [file for file in files if file.suffix == ".safetensors"]
    if pickles and not safe and not allow_pickle:
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run code when it is read; expected safetensors, or `allow_pickle` if "
            "you trust who made it"
        )
    for index in path.glob("*.index.json"):
        check_index(index, allow_pickle)
    return sum(file.stat().st_size for file in (*safe, *pickles))


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header tells sizes that no model has.

    Raises:
        ModelError: names the setting.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is no GGUF file; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for key, most in _GGUF_KEYS.items():
                    at = content.find(f".{key}".encode(), 0, TOKENIZER_BYTES)
                    value = int.from_bytes(content[at + len(key) + 5 : at + len(key) + 9], "little") if at >= 0 else 0
                    if value > most:
                        raise ModelError(f"{path}: {key} is {value:,}; expected at most {most:,}; fetch it again")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch it again") from error


def is_plain_name(name: str, ending: str) -> bool:
    """Whether a name is that of a file in the same folder, with this ending."""
    return name == Path(name).name and name not in ("", ".", "..") and "\\" not in name and name.endswith(ending)


def _check_quantization(told: Any, name: str) -> None:
    """Of a method that transformers does not know it would read the packed weights as if they were plain."""
    if told is None or (not isinstance(told, dict) and hasattr(told, "quant_method")):
        return
    if not isinstance(told, dict):
        raise ModelError(f"{name}: quantization_config is {str(told)[:60]!r}; expected an object with quant_method")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = told.get("quant_method")
    method = str(getattr(method, "value", method))
    is_old = method == "None" and (told.get("load_in_4bit") or told.get("load_in_8bit"))
    if not is_old and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ModelError(
            f"{name}: quant_method is {method[:80]!r} in its quantization_config, which transformers does not know; "
            f"expected one of {', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )


def _settings(config: dict[str, Any], name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every setting at every level, labels of classes left out."""
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
    """What lists in lists hold; how deep they are is checked before."""
    for inner in value if isinstance(value, list) else ():
        yield from _flat(inner)
    if not isinstance(value, list):
        yield value


def _check_length(key: str, value: Any, name: str) -> None:
    """Of a list and of those in it."""
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
    """By the width of the layers alone: what else they hold only adds to that."""

    def first(*keys: str) -> int:
        found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
        return int(found)

    width, layers = first("hidden_size", "n_embd", "d_model"), first("num_hidden_layers", "n_layer", "n_layers")
    inner = first("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim")
    experts = max(1, first("num_experts", "num_local_experts", "n_routed_experts"))
    total = first("vocab_size") * width + layers * width * (2 * width + 2 * inner * experts)
    if total > MOST_PARAMETERS:
        raise ModelError(
            f"{name}: its config tells of {total:.1e} parameters; expected at most {MOST_PARAMETERS:.0e}; "
            "fetch config.json again"
        )
