"""What MkDocs does for this site beyond Markdown: what is made from the code, and links out of docs.

A page asks for what is made by a comment of one line: ``<!-- made: commands -->``, ``<!-- made: settings -->``,
``<!-- made: refused -->`` or ``<!-- made: fields aletheia.planning.plan.Plan -->``. Nothing made is stored. Importing
this needs no MkDocs, so that tests read the same pages.
"""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import typer
from pydantic import BaseModel

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.app import app
from aletheia.cli.wording import flag_of, learn, translate
from aletheia.data.settings import DataSettings
from aletheia.planning.plan import PlanSettings
from aletheia.settings import Settings
from aletheia.training.settings import NOT_TAKEN, TrainSettings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SECTIONS = {"model": LoadSettings, "data": DataSettings, "plan": PlanSettings, "training": TrainSettings}
ORDER = (  # of pages in the navigation; those that are not named here follow by name
    *("index", "README"),
    *("your-data", "train", "small-memory", "qlora", "gpu", "several-devices", "resume", "trainer", "compare-plans"),
    *("evaluate", "answers", "serve", "campaigns"),
    *("commands", "settings", "python", "files", "models", "glossary"),
    *("method", "phases", "prefix-cache", "exactness", "cost-and-memory", "statistics", "trust"),
    *("defaults", "benchmarks", "gpu", "scale", "speed"),
)
KINDS = {"integer": "whole number", "number": "number", "boolean": "yes or no", "string": "text", "null": "none"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
MADE = re.compile(r"^<!-- made: ([\w-]+)(?: ([\w.]+))? -->$", re.MULTILINE)


def commands() -> str:
    """Every command with its usage, an example, and all its options by group."""
    root = typer.main.get_command(app)
    learn(root)
    return "\n".join(_command(name, found) for name, found in commands_of(root))


def commands_of(root: Any, path: str = "aletheia") -> Iterator[tuple[str, Any]]:
    """The whole name of each command, and the command; of a group, those in it."""
    for name, found in root.commands.items():
        if hasattr(found, "commands"):
            yield from commands_of(found, f"{path} {name}")
        else:
            yield f"{path} {name}", found


def _command(path: str, command: Any) -> str:
    context = typer.Context(command, info_name=path)
    usage = command.get_usage(context).removeprefix("Usage: ")
    example = inspect.cleandoc(command.epilog or "").replace("\b", "").removeprefix("Example:").strip()
    lines = [f"## `{path}`\n", inspect.cleandoc(command.help or ""), ""]
    lines += ["```text", re.sub(r"\s+", " ", usage), "```\n", "Example:\n", "```bash", example, "```\n"]
    groups: dict[str, list[Any]] = {}
    for one in parameters_of(command):
        kind = "Arguments" if one.param_type_name == "argument" else getattr(one, "rich_help_panel", None) or "Options"
        groups.setdefault(str(kind), []).append(one)
    slug = path.split(" ", 1)[1].replace(" ", "-")
    for group in sorted(groups, key=lambda name: name != "Arguments"):
        lines.append(f"#### {group} {{ #{slug}-{group.lower().replace(' ', '-')} }}\n")
        lines += [_parameter(slug, one, context) for one in groups[group]]
    return "\n".join(lines)


def parameters_of(command: Any) -> list[Any]:
    """The arguments and options of a command that its help shows."""
    return [one for one in command.params if not getattr(one, "hidden", False)]


def _parameter(slug: str, one: Any, context: Any) -> str:
    name, text = one.get_help_record(context)
    is_option = one.param_type_name == "option"
    shown = " ".join(name.split()) if is_option else one.metavar or one.name.upper()
    anchor = f"{slug}{max(one.opts, key=len)}" if is_option else f"{slug}-{one.name.replace('_', '-')}"
    return f"`{shown}`{{ #{anchor} }}\n:   {_escaped(text)}\n"


def settings() -> str:
    """Every setting of each section: its values, limits and default, and its option."""
    learn(typer.main.get_command(app))
    return "\n".join(_section(section, found) for section, found in SECTIONS.items())


def _section(section: str, found: type[Settings]) -> str:
    lines, group = [f"## {section}\n", inspect.cleandoc(found.__doc__ or "") + "\n"], section
    schema = found.model_json_schema()
    for name, field in schema["properties"].items():
        if field.get("group", group) not in (group, section.capitalize()):
            group = field["group"]
            lines.append(f"### {group}\n")
        written = "name" if (section, name) == ("model", "model") else name
        option = "MODEL" if written == "name" else flag_of(found, name)
        values = f"{kind_of(field)}; {_default(name, field, schema)}; on the command line `{option}`"
        text = translate(field.get("description", ""), {})
        lines.append(f"`{written}`{{ #{section}-{written} }}\n:   {_escaped(text)}\n    <br>*{values}*\n")
    return "\n".join(lines)


def refused() -> str:
    """The fields of transformers' TrainingArguments that are not taken, and why."""
    return "\n".join(f"`{name}`\n:   {_escaped(reason)}\n" for name, reason in sorted(NOT_TAKEN.items()))


def fields(path: str) -> str:
    """What a file's schema says of it: the docstring of the class, and a line for each field."""
    home, _, name = path.rpartition(".")
    found: type[BaseModel] = getattr(import_module(home), name)
    schema = found.model_json_schema()
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(found), re.MULTILINE))
    lines = [_prose(inspect.cleandoc(found.__doc__ or "")), ""]
    for name, field in schema.get("properties", {}).items():
        text = field.get("description") or comments.get(name, "")
        default = "" if name in schema.get("required", ()) else f"; {_default(name, field, schema)}"
        lines.append(f"`{name}`\n:   *{kind_of(field)}{default}*{'. ' if text else ''}{_escaped(text)}\n")
    return "\n".join(lines)


def kind_of(field: dict[str, Any]) -> str:
    """What a field takes, in words, from its JSON schema."""
    if "anyOf" in field:
        kinds = [kind_of(one) for one in field["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != KINDS["null"])) or KINDS["null"]
    if "enum" in field or "const" in field:
        return ", ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "`" + field["$ref"].rsplit("/", 1)[1] + "`"
    if field.get("type") == "array":
        return f"list of {kind_of(field['items'])}" if "items" in field else "list"
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        return f"names, each with {kind_of(inner)}" if isinstance(inner, dict) else "names and values"
    form = {"path": "path", "date": "date"}.get(field.get("format", "")) or KINDS.get(field.get("type", ""), "value")
    bounds = [f"{words} {field[key]:,}" for key, words in LIMITS.items() if key in field]
    return ", ".join([form, *bounds])


def put_in(markdown: str) -> str:
    """A page with what its comments ask for."""
    makers: dict[str, Any] = {"commands": commands, "settings": settings, "refused": refused, "fields": fields}
    return MADE.sub(lambda asked: makers[asked[1]](*filter(None, [asked[2]])), markdown)


def _default(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    value = field.get("default")
    if value is None or value in ([], {}, ""):
        return "not set by default"
    shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
    return f"default {_escaped(str(shown))}" if not isinstance(value, dict) else "has a default"


def _escaped(text: str) -> str:
    """Prose of the code as Markdown: only code spans mean anything in it."""
    parts = re.split(r"(``?[^`]+``?)", _prose(text))
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts)


def _prose(text: str) -> str:
    """A docstring without the roles of reStructuredText."""
    return re.sub(r":(?:func|class|mod|meth|attr):`~?([^`]+)`", r"`\1`", text)


# hooks of MkDocs


def on_config(config: Any) -> Any:
    """Let an entry of the navigation that ends in a slash stand for the pages of that folder."""
    config.nav = [_expanded(entry) for entry in config.nav]
    return config


def _expanded(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    [(title, found)] = entry.items()
    if isinstance(found, list):
        return {title: [page for one in found for page in (_pages(one) if isinstance(one, str) else [_expanded(one)])]}
    return {title: _pages(found) if found.endswith("/") else found}


def _pages(entry: str) -> list[str]:
    """The pages that an entry stands for, those of a folder in the order of ``ORDER``."""
    if not entry.endswith("/"):
        return [entry]
    found = [path for path in (DOCS / entry).rglob("*.md") if path.parent == DOCS / entry or path.name == "README.md"]

    def place(path: Path) -> tuple[int, str]:
        name = path.stem if path.parent == DOCS / entry else path.parent.name
        return (ORDER.index(name) if name in ORDER else len(ORDER)), path.name if name == path.stem else name

    return [str(path.relative_to(DOCS)) for path in sorted(found, key=place)]


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to, outside docs, as they are."""
    from mkdocs.structure.files import File

    linked = {target for page in files.documentation_pages() for target, _ in _outside(page)}
    for target in sorted(linked):
        files.append(File.generated(config, f"repository/{target}", abs_src_path=str(ROOT / target)))
    return files


def _outside(page: Any) -> Iterator[tuple[str, str]]:
    """Files outside docs that a page links to: from the root of the repository, and as written."""
    for _, link in LINK.findall(page.content_string):
        if (target := outside(page.src_uri, link)) and (ROOT / target).is_file():
            yield target, link


def outside(page: str, link: str) -> str | None:
    """Where a link of a page leads to outside docs, from the root of the repository; None: it stays within."""
    if "://" in link or link.startswith(("#", "mailto:", "/")):
        return None
    target = normpath(str(PurePosixPath("docs", page).parent / link.split("#")[0]))
    return None if target == "docs" or target.startswith("docs/") else target


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what is made from the code, and lead links that leave docs to the copies in the site."""
    up = "../" * page.file.src_uri.count("/")
    if not up:  # alone in its section: the width is better used by the page
        page.meta["hide"] = ["navigation"]

    def led(match: re.Match[str]) -> str:
        target = outside(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        return f"[{match[1]}]({up}repository/{target})" if (ROOT / target).is_file() else match[1]

    return put_in(LINK.sub(led, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Take the roles of reStructuredText out of docstrings, and let no line end within the name of an option."""
    plain = re.sub(r":(?:func|class|mod|meth|attr):(<code>)~?", r"\1", html)
    flag = re.compile(r"(?<![\w-])--?\w[\w-]*")
    return re.sub(
        r"<code[^>]*>[^<\n]*</code>", lambda code: flag.sub(r'<span class="flag">\g<0></span>', code[0]), plain
    )
