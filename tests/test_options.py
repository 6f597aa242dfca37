"""Options come from settings objects, a file may hold them, and messages name them as they are typed. No model."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import typer
from pydantic import ByteSize

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli import app as cli
from aletheia.cli.config import build, merge, parse_config, read_config
from aletheia.cli.help import Command
from aletheia.cli.settings_options import from_settings, section_of
from aletheia.cli.wording import translate
from aletheia.data.settings import DataSettings
from aletheia.errors import AletheiaError, SettingsError
from aletheia.settings import DATA, GROUPS, LENGTH, RATE, SAVING, SPEED, Settings, option
from aletheia.settings import GIVEN as GIVEN_TITLE
from aletheia.training.settings import TrainSettings


class FlightSettings(Settings):
    speed: int = option(7, "Speed, beside `use_wings`.", "Flight", ge=1)
    height: float | None = option(None, "Height (by default low).", "Flight")
    use_wings: bool = option(True, "Fly.", "Flight", flag="--wings")
    kind: Literal["bird", "bat"] | None = option(None, "Which.", "Kind")
    kinds: tuple[Literal["bird", "bat"], ...] = option((), "Several.", "Kind")
    load: ByteSize | None = option(None, "Load.", "Kind")
    place: Path = option(..., "Where to.", "Kind")
    seed: int = option(0, "Seed.", "Kind", ge=0)
    hidden: int = 3


class OtherSettings(Settings):
    SECTION: ClassVar[str] = "another"
    seed: int = option(0, "Seed.", "Kind")


GIVEN: list[dict[str, dict[str, object]]] = []


@from_settings(FlightSettings, OtherSettings, leave_out={"height"})
def fly(
    bird: Annotated[str, typer.Argument(metavar="BIRD")],
    out: Annotated[Path | None, typer.Option("--out", help="Place.")] = None,
    *,
    given: dict[str, dict[str, object]],
) -> None:
    """Fly."""
    GIVEN.append(given)


def flown(*arguments: str) -> dict[str, dict[str, object]]:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=Command)(fly)
    app(["robin", "--place", "x", *arguments], standalone_mode=False)
    given = GIVEN.pop()
    assert given["flight"].pop("place") == "x"
    return given


def every_command(command=None, path=()):
    command = command or typer.main.get_command(cli.app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*path, name))


def test_only_what_is_given_arrives():
    assert flown() == {"flight": {}, "another": {}}
    found = flown("--speed", "9", "--no-wings", "--kind", "bat", "--kinds", "bird", "--kinds", "bat", "--load", "6GB")
    assert found["flight"] == {
        "speed": 9, "use_wings": False, "kind": "bat", "kinds": ("bird", "bat"), "load": "6GB"
    }  # fmt: skip
    assert FlightSettings(place="x", **found["flight"]).load == 6_000_000_000


def test_a_field_of_two_classes_is_one_option_for_both():
    assert flown("--seed", "3") == {"flight": {"seed": 3}, "another": {"seed": 3}}


def test_the_settings_class_refuses_what_is_wrong():
    for arguments, words in (
        (("--speed", "0"), "`speed` is 0; expected at least 1"),
        (("--speed", "fast"), "`speed` is 'fast'; expected a whole number"),
        (("--kind", "cow"), "`kind` is 'cow'; expected one of bird, bat"),
    ):
        with pytest.raises(SettingsError) as caught:
            FlightSettings(place="x", **flown(*arguments)["flight"])
        assert str(caught.value) == words


def test_left_out_and_plain_fields_are_no_options():
    for flag in ("--height", "--hidden"):
        with pytest.raises(Exception, match="No such option"):
            flown(flag, "1")


def test_a_name_twice_is_refused_when_the_command_is_made():
    with pytest.raises(ValueError, match="seed is a parameter and a field"):
        from_settings(OtherSettings)(lambda seed, given: None)
    with pytest.raises(ValueError, match="sead"):
        from_settings(OtherSettings, leave_out={"sead"})


def test_help_shows_values_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=Command)(fly)
    app(["--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "Flight: --speed INT Speed, beside --wings. (default: 7)", "--wings / --no-wings Fly. (default: yes)",
        "Kind: --kind {bird,bat} Which. --kinds {bird,bat} Several. --load SIZE Load.",
        "--place PATH Where to. (required)",
    ):  # fmt: skip
        assert part in shown


def written(parameter):
    """An option or argument as its help has it, in one piece."""
    if parameter.param_type_name == "argument":
        return parameter.metavar
    first = next(name for name in parameter.opts if name.startswith("--"))
    if parameter.is_flag:
        return " / ".join([first, *parameter.secondary_opts])
    assert parameter.metavar, f"{first} has no word for its value"
    return f"{first} {parameter.metavar}"


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("path", [path for path, _ in every_command()], ids=" ".join)
def test_no_help_cuts_an_option_or_a_choice_or_is_too_wide(run, monkeypatch, path, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(*path, "--help")
    assert code == 0
    assert "…" not in out
    assert [line for line in out.splitlines() if len(line) > columns] == []
    whole = re.sub(r",\n +(?=\S)", ",", out)  # a list of values goes on behind a comma
    (command,) = [found for known, found in every_command() if known == path]
    for parameter in command.params:
        assert re.search(rf"^  (-\w, )?{re.escape(written(parameter))}(  |$)", whole, re.MULTILINE), written(parameter)


@pytest.mark.parametrize("path", [path for path, _ in every_command()], ids=" ".join)
def test_every_help_text_says_what_and_which(path):
    (command,) = [found for known, found in every_command() if known == path]
    for parameter in command.params:
        assert re.match(r"[A-Z].{9,}", parameter.help), written(parameter)
        assert re.search(r"[.)]$", parameter.help), written(parameter)
        for choice in re.findall(r"\w[\w-]*", (parameter.metavar or "").partition("}")[0].partition("{")[2]):
            if path == ("train",) and parameter.name not in ("dtype", "attention", "cache", "packing"):
                assert choice in parameter.help, f"{written(parameter)}: {choice}"


def test_the_options_of_train_stand_in_groups(run):
    out = run("train", "--help")[1]
    assert re.findall(r"^(\w.*):$", out, re.MULTILINE) == [*(GIVEN_TITLE, *GROUPS), "Example"]
    for title, names in {
        GIVEN_TITLE: ("--data", "--out", "--config"), DATA: ("--max-length", "--eval-data"),
        LENGTH: ("--steps", "--epochs", "--batch-size"), RATE: ("--learning-rate", "--optim"),
        SPEED: ("--gradient-checkpointing", "--cache", "--packing"), SAVING: ("--keep", "--save-steps", "--resume"),
    }.items():  # fmt: skip
        section = out.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert all(f"\n  {name} " in f"\n{section}" for name in names), title


def test_all_that_is_missing_is_named_at_once(run):
    for arguments, names in (
        (("train",), "MODEL, --data and --out are missing"),
        (("train", "--data", "x.jsonl", "--out", "run"), "MODEL is missing"),
        (("plan",), "SCORES is missing"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith(f"error: {names}; expected for example: aletheia {arguments[0]} ")


def test_every_field_that_a_command_offers_is_in_its_help(run):
    _, out, _ = run("probe", "--help")
    for choices in ("--dtype {auto,bfloat16,float16,float32}", "--quantize {nf4,int8}", "--max-memory SIZE"):
        assert choices in out


def test_messages_name_options_as_they_are_typed():
    assert translate("`max_length` is 1; `stream=False`, `dtype=float32` or `overwrite=True`", {
        "max_length": "--max-length", "stream": "--stream", "dtype": "--dtype", "overwrite": "--overwrite",
    }) == "--max-length is 1; --no-stream, --dtype float32 or --overwrite"  # fmt: skip
    assert translate("`training.steps` of `no_such_thing`; `pip install x`") == (
        "training.steps of no_such_thing; pip install x"
    )
    assert translate("`group_by_length` and `save_steps`") == "--group-by-length and --save-steps"


def test_a_usage_error_points_to_the_help_of_its_command(run):
    for arguments, command in (
        (("train", "--fast"), "aletheia train"),
        (("campaign", "run", "--fast"), "campaign run"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith("error: No such option")
        assert err.rstrip().endswith(f"{command} --help'")
    assert run("train", "--steps")[2].rstrip().endswith("requires an argument; see 'aletheia train --help'")
    assert run("tune")[2].rstrip().endswith("see 'aletheia --help'")


def test_an_error_may_ask_for_its_exit_code(run, monkeypatch):
    class EndedError(AletheiaError):
        exit_code = 143

    def end(*_):
        raise EndedError("ended at `steps`")

    monkeypatch.setattr("aletheia.anatomy.load.inspect", end)
    code, _, err = run("inspect", "model")
    assert (code, err) == (143, "error: ended at --steps\n")


def test_data_given_twice_is_two_files(run, model_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n')
    code, _, err = run("probe", model_folder, "--data", "a.jsonl", "--data", "absent.jsonl", "--out", "s.json")
    assert code == 2
    assert "absent.jsonl" in err
    code, _, err = run("probe", model_folder, "--out", "s.json")
    assert code == 2
    assert err.startswith("error: --data is missing; expected for example: aletheia probe ")


FILE = """
model: {name: a/b, quantize: nf4}
data: train.jsonl
plan: {percent: 50}
training:
  cache: off
  epochs: 1
  learning_rate: 1e-4
  ddp_timeout: 5
"""


def test_a_file_holds_all_settings():
    found = parse_config(FILE, "run.yaml")
    assert found["model"] == {"model": "a/b", "quantize": "nf4"}
    assert found["data"] == {"data": "train.jsonl"}
    training = build(TrainSettings, found, {})
    assert (training.cache, training.learning_rate, training.model_extra) == ("off", 1e-4, {"ddp_timeout": 5})
    assert build(LoadSettings, parse_config("model: a/b", "f"), {}).model == "a/b"
    assert build(DataSettings, parse_config("data: [a, b]", "f"), {}).data == ("a", "b")
    assert parse_config("", "f") == {}
    assert parse_config("plan: {file: plan.json}\ntraining:", "f") == {"plan": {"file": "plan.json"}, "training": {}}


def test_flags_go_before_the_file_and_put_aside_what_they_exclude():
    found = parse_config(FILE, "run.yaml")
    merged = merge(found, {"training": {"steps": 3, "cache": "disk"}, "plan": {"file": "plan.json"}})
    assert merged["training"] == {"steps": 3, "cache": "disk", "learning_rate": 1e-4, "ddp_timeout": 5}
    assert merged["plan"] == {"file": "plan.json"}
    assert merged["model"] == found["model"]
    assert found["training"]["epochs"] == 1
    both = {"plan": {"seed": 3}, "training": {"seed": 3}}
    assert merge({"plan": {"file": "p"}}, both)["plan"] == {"file": "p", "seed": 3}
    assert merge({"plan": {"file": "p"}}, {"plan": {"percent": 3}})["plan"] == {"percent": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainin: {steps: 1}", "unknown section trainin; expected perhaps training"),
        ("data: {max_lenght: 1}", "`data.max_lenght`; expected perhaps max_length"),
        ("training: {stepz: 1}", "`training.stepz`; expected perhaps steps"),
        ("model: 3", "`model` is 3"),
        ("plan: {file: p.json, percent: 5}", "both given"),
        ("a: &x {b: 1}\ndata: *x", "f:1: found an anchor"),
        ("data: {<<: {max_length: 5}}", "f:1: found a merge key"),
        ("data: {data: a, data: b}", "found data twice"),
        ("- a", "holds a list"),
        ("model: [", "f:1"),
        ("model: !!python/name:os.system", "f:1: found a tag"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(text, words):
    with pytest.raises(SettingsError) as caught:
        parse_config(text, "f")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_of_the_file_is_named_with_its_section():
    for settings, text, given, words in (
        (TrainSettings, "training: {steps: 0}", {}, "`training.steps` is 0"),
        (TrainSettings, "training: {steps: 5}", {"training": {"steps": 0}}, "`steps` is 0"),
        (TrainSettings, "training: {fp16: true}", {}, "`training.fp16` cannot be set"),
        (LoadSettings, "model: {dtype: int3}", {"model": {"model": "m"}}, "`model.dtype` is 'int3'"),
    ):
        with pytest.raises(SettingsError) as caught:
            build(settings, parse_config(text, "f"), given)
        assert str(caught.value).startswith(words)


def test_a_file_is_read_up_to_100_kilobytes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("#" * 99_999 + "\n")
    assert read_config(path) == {}
    path.write_text("#" * 100_001)
    with pytest.raises(SettingsError, match="larger than 100 kB"):
        read_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_config(path)
    with pytest.raises(SettingsError, match="cannot read"):
        read_config(tmp_path)


def test_sections_are_named_after_the_classes():
    assert [section_of(one) for one in (LoadSettings, DataSettings, TrainSettings)] == ["model", "data", "training"]
    assert section_of(FlightSettings) == "flight"


def test_reading_a_file_loads_no_torch():
    code = (
        "import sys\nfrom aletheia.cli.config import parse_config\nparse_config('training: {steps: 1}', 'f')\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
