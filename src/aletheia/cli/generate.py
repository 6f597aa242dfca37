"""``aletheia generate``: answers of a trained adapter, and of its base for comparison."""

import sys
from typing import Annotated, Literal

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import JsonOption, print_json
from aletheia.cli.settings_options import Given, from_settings
from aletheia.data.settings import DataSettings
from aletheia.runs.answers import GenerateSettings

EXAMPLE = 'aletheia generate run --prompt "What is LoRA?" --against base'
OF_TRAINING = {  # settings that do not affect answers
    *("model", "stream", "max_memory", "fresh", "data", "max_length", "train_on"),
    *("eval_data", "eval_fraction", "eval_rows"),
}


@from_settings(LoadSettings, DataSettings, GenerateSettings, leave_out=OF_TRAINING)
def generate(
    model: Annotated[
        str,
        typer.Argument(help="Run folder, PEFT adapter folder, hub id, model folder or .gguf file.", metavar="MODEL"),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="Text to answer; - reads it from stdin. Repeat the option for more.", metavar="TEXT"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Rows to answer, in any form that train takes; each row's own last answer is shown, too. Repeat the "
            "option for more.",
            metavar="DATA",
        ),
    ] = None,
    against: Annotated[
        Literal["base"] | None,
        typer.Option("--against", help="Also show the answers of the base model.", metavar="{base}"),
    ] = None,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Answer prompts or rows of data with a trained adapter, and with its base model for comparison."""
    from rich.console import Console

    from aletheia.job.generate import generate as answered
    from aletheia.reporting.answers import render_answers

    prompts = [sys.stdin.read() if text == "-" else text for text in prompt or ()]
    rows = given["data"] | ({"data": tuple(data)} if data else {})
    loading = LoadSettings(model=model, **given["model"])
    answers = answered(loading, prompts, rows, against, GenerateSettings(**given["generate"]))
    if as_json:
        print_json([answer.model_dump(mode="json") for answer in answers])
        return
    console = Console(highlight=False, markup=False, emoji=False)  # answers are not markup
    console.print(render_answers(answers, console.width))
