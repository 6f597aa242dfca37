"""``aletheia eval``: measure what a model can do, and what an adapter made it forget."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import MODEL, JsonOption, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.data.settings import DataSettings
from aletheia.lab.evaluation.settings import EvalChoice
from aletheia.settings import GIVEN

if TYPE_CHECKING:
    from aletheia.lab.evaluation.record import Evaluated

EXAMPLE = "aletheia eval Qwen/Qwen2.5-0.5B-Instruct --adapter run --tasks mmlu,gsm8k --limit 200 --out run-eval"


OF_TRAINING = {  # settings that only training has
    *("model", "stream", "max_memory", "fresh", "base", "data", "eval_data", "eval_fraction", "eval_rows", "train_on"),
    *("chat_template", "template_date"),
}


@from_settings(LoadSettings, DataSettings, EvalChoice, leave_out=OF_TRAINING - {"eval_data"})
def eval(
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL} Without it, the evaluation in --out is shown.", metavar="MODEL"),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the evaluation; an interrupted one in it resumes.", metavar="FOLDER"),
    ] = ...,  # type: ignore[assignment]
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            help="Run folder or PEFT adapter folder to put on the model. (default: the model alone)",
            metavar="RUN",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            help="Folder of a finished evaluation to compare with, item by item. The base model's shows what was "
            "forgotten. Repeat the option for more.",
            metavar="FOLDER",
        ),
    ] = None,
    unsafe_exec: Annotated[
        bool,
        typer.Option(
            "--unsafe-exec", help="Run the programs that the model writes for humaneval, even without a sandbox."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in --out.")] = False,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Measure what a model can do, with or without an adapter: benchmarks, and the loss on held-out rows."""
    from aletheia.lab.evaluation.against import compare
    from aletheia.lab.evaluation.record import Evaluated
    from aletheia.lab.reporting.evaluation_table import comparison_table, evaluation_table

    others = [Evaluated.read(path) for path in against or ()]
    done = Evaluated.read(out) if model is None else _evaluate(model, adapter, out, given, unsafe_exec, overwrite)
    compared = [compare(done, other) for other in others]
    if as_json:
        found = done.evaluation.model_dump(mode="json")
        print_json(found | {"against": [one.model_dump(mode="json") for one in compared]} if compared else found)
    else:
        print_rich(evaluation_table(done.evaluation), *(comparison_table(one) for one in compared))


def _evaluate(
    model: str, adapter: Path | None, out: Path, given: Given, unsafe_exec: bool, overwrite: bool
) -> "Evaluated":
    """Load and evaluate, unless the folder already holds the result."""
    from aletheia.anatomy.fingerprint import identify
    from aletheia.job.source import load_as_asked
    from aletheia.lab.evaluation.evaluate import Origin, claim, eval_settings, evaluate, with_adapter

    loading, asked = LoadSettings(model=model, **given["model"]), EvalChoice(**given["eval"])
    cut = {name: value for name, value in given["data"].items() if name != "eval_data"}
    rows = DataSettings(data=("none",), **cut)  # how held-out rows are cut, if there are any
    settings = eval_settings(
        asked.data_dir, adapter, model=model, max_length=rows.max_length, skip_unusable=rows.skip_unusable,
        dtype=loading.dtype, quantize=loading.quantize, attention=loading.attention, **asked.of_result(),
    )  # fmt: skip
    if (finished := claim(out, settings, overwrite)) is not None:
        say(f"found  a finished evaluation with these settings in {out}")
        return finished
    started = time.perf_counter()
    say(f"load   {model}")
    base = load_as_asked(loading)
    identity = identify(base.model)
    if settings.adapter is not None:
        base = with_adapter(base, settings.adapter, settings, loading.allow_pickle)
    origin = Origin(identity, time.perf_counter() - started)
    done = evaluate(base, settings, out, asked.data_dir, origin, unsafe_exec, overwrite)
    say(f"wrote {out} (eval.json, items.parquet)")
    return done
