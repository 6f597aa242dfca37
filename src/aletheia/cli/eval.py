"""``aletheia eval``: what a model can do, and what an adapter made it forget."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import JsonOption, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.data.settings import DataSettings

if TYPE_CHECKING:
    from aletheia.lab.evaluation.record import EvalSettings, Evaluated

EXAMPLE = "aletheia eval Qwen/Qwen2.5-0.5B-Instruct --adapter run --tasks mmlu,gsm8k --limit 200 --out run-eval"


@from_settings(
    LoadSettings,
    DataSettings,
    leave_out={
        "model",
        "stream",
        "max_memory",
        "fresh",
        "base",
        "data",
        "eval_data",
        "eval_fraction",
        "eval_rows",
        "train_on",
        "chat_template",
        "template_date",
    },
)
def eval(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub id, local folder or .gguf file; without it, show what lies in --out.", metavar="MODEL"
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write, or to go on in, or to show.")] = ...,  # type: ignore[assignment]
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Run folder or PEFT adapter to put on the model.", metavar="RUN")
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Some of mmlu, gsm8k, humaneval, wikitext, heldout, with commas between.")
    ] = "mmlu,gsm8k,wikitext",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Items per task, evenly spaced, always the same (all by default).")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Folder with mmlu/, gsm8k/, humaneval/, wikitext2/ (the hub by default)."),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Rows of the task heldout, in any form that --data takes.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            help="Finished evaluation to compare with per item: of the base, for forgetting; of another adapter, "
            "for extra forgetting. May be given several times.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples in the prompt (upstream's number by default).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest answer (by default 256; humaneval 1024).")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts computed at once.")] = 8,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", help="Longest prompt, and the window of wikitext (the model's by default)."),
    ] = None,
    unsafe_exec: Annotated[
        bool, typer.Option("--unsafe-exec", help="Where there is no sandbox, run humaneval's programs without one.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in --out.")] = False,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Evaluate a model, with an adapter or without, on lm-eval's tasks and held-out rows; interrupted, it goes on."""
    from aletheia.lab.evaluation.against import compare
    from aletheia.lab.evaluation.record import Evaluated
    from aletheia.lab.reporting.evaluation_table import comparison_table, evaluation_table

    others = [Evaluated.read(path) for path in against or ()]
    if model is None:
        done = Evaluated.read(out)
    else:
        from aletheia.lab.evaluation.evaluate import eval_settings

        loading = LoadSettings(model=model, **given["model"])
        rows = DataSettings(
            data=(eval_data or "none",), **given["data"]
        )  # how held-out rows are cut, where there are any
        settings = eval_settings(
            data_dir, adapter, model=model, tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit, eval_data=eval_data, num_fewshot=num_fewshot, chat=chat, max_new_tokens=max_new_tokens,
            context_length=context_length, max_length=rows.max_length, skip_unusable=rows.skip_unusable,
            batch_size=batch_size, dtype=loading.dtype, quantize=loading.quantize, attention=loading.attention,
        )  # fmt: skip
        done = _evaluate(loading, settings, out, data_dir, unsafe_exec, overwrite)
    compared = [compare(done, other) for other in others]
    if as_json:
        found = done.evaluation.model_dump(mode="json")
        print_json(found | {"against": [one.model_dump(mode="json") for one in compared]} if compared else found)
    else:
        print_rich(evaluation_table(done.evaluation), *(comparison_table(one) for one in compared))


def _evaluate(
    loading: LoadSettings,
    settings: "EvalSettings",
    out: Path,
    data_dir: Path | None,
    unsafe_exec: bool,
    overwrite: bool,
) -> "Evaluated":
    """Load and evaluate, unless the folder holds the result already."""
    from aletheia.anatomy.fingerprint import identify
    from aletheia.job.source import load_as_asked
    from aletheia.lab.evaluation.evaluate import Origin, claim, evaluate, with_adapter

    if (finished := claim(out, settings, overwrite)) is not None:
        say(f"found  {out}, finished with these settings")
        return finished
    started = time.perf_counter()
    say(f"load   {settings.model}")
    base = load_as_asked(loading)
    identity = identify(base.model)
    if settings.adapter is not None:
        base = with_adapter(base, settings.adapter, settings, loading.allow_pickle)
    origin = Origin(identity, time.perf_counter() - started)
    done = evaluate(base, settings, out, data_dir, origin, unsafe_exec, overwrite)
    say(f"wrote {out} (eval.json, items.parquet)")
    return done
