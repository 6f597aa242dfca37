"""``aletheia preview``: show rows as the model will see them."""

from dataclasses import asdict
from typing import Annotated

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import JsonOption, ModelArgument, print_json
from aletheia.cli.settings_options import Given, from_settings
from aletheia.cli.wording import translate
from aletheia.data.settings import DataSettings

EXAMPLE = "aletheia preview Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl"
WITHOUT_WEIGHTS = {  # settings that only matter when weights are loaded
    *("model", "dtype", "quantize", "attention", "stream", "max_memory", "allow_pickle", "fresh"),
}


@from_settings(LoadSettings, DataSettings, leave_out=WITHOUT_WEIGHTS)
def preview(
    model: ModelArgument,
    row: Annotated[
        list[int] | None,
        typer.Option(
            "--row",
            help="Number of a row to show in full, from 1. Repeat the option for more. (default: three rows that "
            "differ, long texts shortened)",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Show rows as the model will see them: which tokens are learned, and counts of all rows. Reads no weights."""
    from dataclasses import replace

    from rich.console import Console

    from aletheia.job.preview import preview as made
    from aletheia.reporting.preview import WIDTH, render_preview

    found = made(LoadSettings(model=model, **given["model"]), DataSettings(**given["data"]), tuple(row or ()))
    found = replace(
        found,
        notes=tuple(translate(note) for note in found.notes),
        left_out={translate(reason): count for reason, count in found.left_out.items()},
    )
    if as_json:
        print_json(asdict(found))
        return
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    console.print(render_preview(found, console, whole=bool(row)))
