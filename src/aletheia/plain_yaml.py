"""The only place that reads YAML: plain values only, in bounded time. Loads no torch.

Numbers, true, false and null are read as in YAML 1.2 and JSON, so ``off`` is text and 010 is ten. Aliases, anchors,
merge keys, tags and duplicate keys are refused: they let a small file grow huge, or mean something else than it shows.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from aletheia.errors import SettingsError

LARGEST_BYTES = 100_000  # the parser takes seconds for more


def read_yaml(path: Path) -> Any:
    """The content of a file; see :func:`parse_yaml`.

    Raises:
        SettingsError: the file cannot be read, is too large, or is not UTF-8 or not plain YAML.
    """
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"cannot read {path} (not a regular file); expected a YAML file")
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"cannot read {path} ({error.strerror}); expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8; expected a YAML file") from error
    if len(content) > LARGEST_BYTES:
        raise SettingsError(f"{path} is larger than {LARGEST_BYTES / 1000:.0f} kB; expected a settings file")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Mappings, lists, text, numbers, true, false and null of one document.

    Raises:
        SettingsError: the document holds anything else; the message names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{name}{line}: {error.problem}; expected plain YAML") from None
    except RecursionError:
        raise SettingsError(f"{name}: nested too deeply; expected plain YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{name}: {' '.join(str(error).split())[:200]}; expected plain YAML") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            _refuse("found an alias (*), expected the value itself", event)
        if getattr(event, "anchor", None) is not None:
            _refuse("found an anchor (&), expected the value alone", event)
        if getattr(event, "tag", None) is not None:
            _refuse(f"found a tag ({event.tag[-60:]}), expected a plain value", event)
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
            _refuse("found a merge key (<<), expected the settings themselves", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("found a key that is not a name", key)
            if key.value in keys:
                _refuse(f"found {key.value[:60]} twice", key)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse(problem: str, at: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _number(kind: type[int] | type[float]) -> Any:
    def construct(loader: Any, node: Any) -> int | float:
        try:
            return kind(node.value)
        except ValueError:  # thousands of digits
            _refuse(f"found a number of {len(node.value):,} characters", node)
            raise

    return construct


for _tag, _pattern, _first in (
    ("null", r"(~|null|)$", ["~", "n", ""]),
    ("bool", r"(true|false)$", list("tf")),
    ("int", r"[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern, re.IGNORECASE), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _number(int))
_Loader.add_constructor("tag:yaml.org,2002:float", _number(float))
