"""Which files a source names: one file, a pattern, or a folder with its splits. Only names are read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from aletheia.data.formats import READERS, SUFFIXES, format_of
from aletheia.data.sources import one_line
from aletheia.data.unpack import PACKED
from aletheia.errors import DataError
from aletheia.kinds import mistaken, near

TRAIN = "train"
# words in names of files and folders -> the split they mean
SPLITS = dict.fromkeys(("train", "training"), TRAIN)
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation", "heldout"), "test")
HELD_OUT = ("test", "validation")
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+$")  # how the hub names the files of a split
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_PAPERS = ("readme", "license", "licence", "citation", "changelog")
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """The files of one source, in reading order: data files, and folders that ``save_to_disk`` wrote."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def find(source: str) -> Found | None:
    """The files of a path, a pattern (``train-*.jsonl``, ``**``), or a folder as ``FOLDER[:config][:split]``.

    A folder with splits gives its ``train`` split. A pattern gives all files but held-out ones that it does not name.
    None if ``source`` can only be a hub data set.

    Raises:
        DataError: nothing is there, or a folder holds no data, several data sets, or only held-out rows.
    """
    path = Path(source)
    if _exists(path):
        if (fault := mistaken(path, "rows of data", "rows", "page")) is not None:
            raise DataError(fault)
        return _in_folder(path) if path.is_dir() else Found((path,))
    name, config, split = name_parts(source)
    if name and name != source and _exists(Path(name)):
        if not Path(name).is_dir():
            raise DataError(f"{source}: found a file, which has no splits; expected a folder; give {name} alone")
        return _in_folder(Path(name), config, split)
    if _is_pattern(source):
        return _matching(source)
    if format_of(path) in READERS:
        hint = near(path, "rows") or ("" if path.parent.exists() else f"; there is no folder {path.parent}")
        raise DataError(f"{source}: found no such file; check the path (looked in {Path.cwd()}){hint}")
    return None


def name_parts(source: str) -> tuple[str, str, str]:
    """The three parts of ``name[:config[:split]]``; empty where left out."""
    name, config, split = [*source.split(":", 2), "", ""][:3]
    return name, config, split


def whole_source(source: str) -> str:
    """The source with local paths and patterns made absolute, so that it is valid in any working folder."""
    name, *rest = source.split(":", 1)
    if _exists(Path(source)):
        return str(Path(source).resolve())
    if rest and _exists(Path(name)):
        return f"{Path(name).resolve()}:{rest[0]}"
    return str(Path.cwd() / source) if _is_pattern(source) else source


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for the file system, or with a NUL
        return False


# --- patterns


def _is_pattern(source: str) -> bool:
    return any(char in source for char in "*?") or "[" in source.partition(":")[0]  # name:config:train[:50]


def _matching(source: str) -> Found:
    paths = _matches(source)
    files = [path for path in paths if path.is_file() and not _is_description(path)]
    data = [path for path in files if format_of(path) in READERS]
    if not data:
        found = f"only {_names(path.name for path in paths)}" if paths else "no file that matches"
        raise DataError(
            f"{source}: found {found}, expected files in one of the formats {SUFFIXES}; "
            f"check the pattern (looked in {Path.cwd()}{_near(Path(source))})"
        )
    passed = [path.name for path in files if path not in data]
    folder, pattern = _parts_of(source)
    asked = {SPLITS[word] for word in _words(str(pattern)) if word in SPLITS}
    held_out: dict[str, list[Path]] = {}
    for path in data:
        if (split := _held_out_split(path.relative_to(folder))) and split not in asked:
            held_out.setdefault(split, []).append(path)
    if sum(map(len, held_out.values())) == len(data):  # 'test/*.jsonl': the folder names them
        held_out.pop(SPLITS.get(folder.name.lower(), ""), None)
    read = [path for path in data if not any(path in paths for paths in held_out.values())]
    if not read:
        raise DataError(
            f"{source}: found only held-out rows ({_names(path.name for path in data)}), expected rows to learn from; "
            "to read these, name the files"
        )
    left = [f"{_names(path.name for path in paths)} ({split})" for split, paths in held_out.items()]
    return Found(tuple(read), (_note(source, read, left, passed),))


def _parts_of(source: str) -> tuple[Path, Path]:
    """The fixed folder at the start of a pattern, and the rest."""
    parts = Path(source).parts
    start = next(at for at, part in enumerate(parts) if _is_pattern(part))
    return Path(*parts[:start]), Path(*parts[start:])


def _held_out_split(path: Path) -> str:
    """The held-out split that the name of a file or of a folder above it means; else empty."""
    above = (SPLITS.get(part.lower(), "") for part in reversed(path.parent.parts))
    named = next((split for split in (_meaning(_split_of(path)), *above) if split), "")
    return named if named in HELD_OUT else ""


def _matches(source: str) -> list[Path]:
    """The sorted matches of a pattern; ``**`` follows no links, and hidden names match only dotted patterns."""
    folder, pattern = _parts_of(source)
    try:
        found = sorted(folder.glob(str(pattern)))
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{source}: found an invalid pattern ({one_line(error)}); expected one such as *.jsonl"
        ) from error
    if any(part.startswith(".") for part in pattern.parts):
        return found
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _near(path: Path) -> str:
    """Names similar to ``path`` in its folder, for the end of a message."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return f", no folder {path.parent}"
    near = get_close_matches(path.name, names, 3, 0.4)
    return f"; there is {_names(near)}" if near else ""


# --- folders


def _in_folder(folder: Path, config: str = "", split: str = "") -> Found:
    try:
        if is_saved(folder):
            if config or split:
                raise DataError(f"{folder}: found one saved data set without splits; expected only its name")
            return Found((folder,))
        splits, inner, passed = _contents(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    if config and not split and _split_named(config, splits) in splits:
        config, split = "", config
    if config:
        if config not in inner:
            raise _no_such(folder, config, splits, inner)
        return _in_folder(folder / config, "", split)
    if not splits:
        if len(inner) == 1:
            return _in_folder(folder / inner[0], "", split)
        if inner:
            raise DataError(
                f"{folder}: found no data files but the folders {_names(inner)}; name one of them, "
                f"as {folder}:{inner[0]}"
            )
        holds = f"only {_names(passed)}" if passed else "nothing to read"
        raise DataError(
            f"{folder}: found {holds}, expected data files ({SUFFIXES}, also followed by {' or '.join(PACKED)}) "
            "or what save_to_disk writes; check the folder"
        )
    chosen = _split_named(split, splits) if split else _to_learn_from(folder, splits)
    if chosen not in splits:
        raise _no_such(folder, split, splits, inner)
    left = (
        []
        if split
        else [
            f"{_names(path.name for path in paths)} ({f'{folder}:{name}' if name else 'no split'})"
            for name, paths in splits.items()
            if name != chosen
        ]
    )
    return Found(tuple(splits[chosen]), (_note(f"{folder}", splits[chosen], left, passed),))


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote one data set into the folder."""
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _contents(folder: Path) -> tuple[dict[str, list[Path]], list[str], list[str]]:
    """The splits of a folder with their files in order, its folders that are not splits, and the names of other files.

    Files whose name means no split belong to ``train``, or to the split ``""`` if other files are named ``train``.
    """
    splits: dict[str, list[Path]] = {}
    inner: list[str] = []
    passed: list[str] = []
    for entry in _visible(folder):
        if not entry.is_dir():
            _sort_in(entry, _split_of(entry), splits, passed)
        elif is_saved(entry):
            splits.setdefault(SPLITS.get(entry.name.lower(), entry.name), []).append(entry)
        elif entry.name == "data" or entry.name.lower() in SPLITS:
            for file in _visible(entry):
                if file.is_file():
                    _sort_in(file, SPLITS.get(entry.name.lower()) or _split_of(file), splits, passed)
        elif not entry.name.startswith("checkpoint") and _holds_data(entry):
            inner.append(entry.name)
    by_name = [path for path in splits.get(TRAIN, ()) if _begins_as_train(path)]
    if "" in splits and not by_name:  # 'gsm8k_train.jsonl' next to 'mine.jsonl' are not splits
        splits[TRAIN] = sorted([*splits.pop(""), *splits.get(TRAIN, ())])
    return splits, inner, passed


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))


def _is_data(path: Path) -> bool:
    if path.is_dir():
        return path.name in ("data", *SPLITS) or is_saved(path)
    return format_of(path) in READERS and not _is_description(path)


def _holds_data(folder: Path) -> bool:
    try:
        return any(_is_data(one) for one in _visible(folder))
    except OSError:  # no permission
        return False


def _is_description(path: Path) -> bool:
    return path.name in _DESCRIPTIONS or path.name.lower().split(".")[0] in _PAPERS


def _sort_in(file: Path, split: str, splits: dict[str, list[Path]], passed: list[str]) -> None:
    if _is_data(file):
        splits.setdefault(split, []).append(file)
    elif not _is_description(file):
        passed.append(file.name)


def _stem(path: Path) -> str:
    name = path.name
    for suffix in reversed(path.suffixes[-2:]):
        if suffix.lower() in (*PACKED, *READERS):
            name = name.removesuffix(suffix)
    return name


def _split_of(path: Path) -> str:
    """The split that a file name means, by its first or last word; empty if none."""
    stem = _stem(path)
    if shard := _SHARD.match(stem):
        return SPLITS.get(shard["split"].lower(), shard["split"])
    return _meaning(stem)


def _meaning(name: str) -> str:
    """The split that a name means, by its first or last word: ``train_sft`` means ``train``; empty if none."""
    words = _words(name)
    return next((SPLITS[word] for word in (*words[:1], *words[-1:]) if word in SPLITS), "")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower().replace("held_out", "heldout").replace("held-out", "heldout"))


def _begins_as_train(path: Path) -> bool:
    words = _words(_stem(path))
    return SPLITS.get(path.parent.name.lower()) == TRAIN or (bool(words) and SPLITS.get(words[0]) == TRAIN)


def _split_named(split: str, splits: Mapping[str, object]) -> str:
    """The key of a requested split, by its name or a synonym."""
    return split if split in splits else SPLITS.get(split.lower(), split)


def _to_learn_from(folder: Path, splits: Mapping[str, Sequence[Path]]) -> str:
    if TRAIN in splits:
        return TRAIN
    others = [name for name in splits if _meaning(name) not in HELD_OUT]
    of_train = [name for name in others if _meaning(name) == TRAIN]
    if len(of_train) == 1:
        return of_train[0]
    if len(splits) == 1 and others:
        return others[0]
    first = (of_train or others or list(splits))[0]
    found = f"the splits {_names(splits)}" if others else f"only held-out rows ({_names(splits)})"
    raise DataError(f"{folder}: found {found}, expected rows to learn from; name a split, as {folder}:{first}")


def _no_such(folder: Path, asked: str, splits: Mapping[str, object], inner: Sequence[str]) -> DataError:
    known = [name for name in (*splits, *inner) if name]
    return DataError(f"{folder}:{asked}: found no split or folder of that name; expected one of {_names(known)}")


def _note(source: str, read: Sequence[Path], left: Sequence[str], passed: Sequence[str]) -> str:
    files = "1 file" if len(read) == 1 else f"{len(read)} files"
    text = f"{source}: {files} read ({_names(path.name for path in read)})"
    text += f"; left out: {', '.join(left)}" if left else ""
    return text + (f"; skipped (unknown format): {_names(passed)}" if passed else "")


def _names(names: Iterable[str]) -> str:
    """Names for a message; a long list is cut."""
    every = list(names)
    more = len(every) - _NAMES_SHOWN
    shown = ", ".join("".join(char if char.isprintable() else "?" for char in name) for name in every[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
