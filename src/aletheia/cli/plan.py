"""``aletheia plan``: from scores to the modules that get LoRA."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.options import JsonOption, SeedOption, parse_memory, print_json, print_rich, say

if TYPE_CHECKING:
    from aletheia.planning.estimate import Job
    from aletheia.probing.scores import Scores

EXAMPLE = "aletheia plan scores.json --out plan.json --percent 50"


def plan(
    scores: Annotated[Path, typer.Argument(help="Scores file of 'aletheia probe'.", metavar="SCORES")],
    out: Annotated[Path | None, typer.Option("--out", help="Plan file to write.")] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="depth-aware, top-percent, last, first, random, bottom or uniform.")
    ] = "depth-aware",
    percent: Annotated[
        float,
        typer.Option("--percent", help="Share of the layers; for depth-aware, the step time of the last such share."),
    ] = 50,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank; for by-score, the parameter budget.")] = 16,
    ranks: Annotated[str, typer.Option("--ranks", help="uniform, by-role or by-score.")] = "uniform",
    attention_rank: Annotated[
        int | None, typer.Option("--attention-rank", help="Rank of attention modules; implies by-role.")
    ] = None,
    mlp_rank: Annotated[
        int | None, typer.Option("--mlp-rank", help="Rank of all other modules; implies by-role (then 64 by default).")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Alpha at --rank; the ratio holds everywhere (2 x rank by default)."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option("--speedup", help="For depth-aware: the most importance at this predicted speed-up."),
    ] = None,
    quality_first: Annotated[
        bool, typer.Option("--quality-first", help="The most importance at the paper's saving: --speedup 1.30.")
    ] = False,
    epochs: Annotated[
        float, typer.Option("--epochs", help="Passes that the time is counted for; later ones read the prefix cache.")
    ] = 1.0,
    routers: Annotated[
        bool, typer.Option("--adapt-routers", help="Adapt the routers of a mixture of experts, too.")
    ] = False,
    freeze_after: Annotated[
        float,
        typer.Option("--freeze-after", help="Share of the steps in which the other layers learn, too, then freeze."),
    ] = 0.0,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="What training may take in all, such as 6GB: bounds the lowest layer."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", help="Tokens of the largest training batch, for --max-memory.")
    ] = 4096,
    seed: SeedOption = 0,
    show_frontier: Annotated[
        bool, typer.Option("--frontier", help="Print predicted step time against captured importance.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the frontier to this file: .svg, .png or .pdf.")
    ] = None,
    show_estimate: Annotated[
        bool, typer.Option("--estimate", help="Print memory, disk, reads and time of the job on usual machines.")
    ] = False,
    rows: Annotated[int | None, typer.Option("--rows", help="For --estimate (by default those probed from).")] = None,
    tokens_per_row: Annotated[
        int | None, typer.Option("--tokens-per-row", help="For --estimate (by default the probe's mean).")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="For --estimate.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Choose layers and ranks from scores and write them as a plan, or print the frontier of all choices."""
    from aletheia.errors import PlanError
    from aletheia.planning.estimate import MACHINES, estimate_plan
    from aletheia.planning.make import plan as make_plan
    from aletheia.planning.make import plan_frontier
    from aletheia.probing.scores import Scores
    from aletheia.reporting.estimate import estimate_view
    from aletheia.reporting.frontier import check_plot, frontier_view, plot_frontier
    from aletheia.reporting.terminal import render

    if out is None and not show_frontier and plot is None and not show_estimate:
        raise PlanError("nothing to do: expected --out plan.json, --frontier, --plot, --estimate, or several of them")
    if plot is not None:
        check_plot(plot)
    read = Scores.read(scores)
    made = make_plan(
        read,
        policy,
        percent,
        rank,
        ranks,
        attention_rank,
        mlp_rank,
        alpha,
        seed,
        speedup,
        quality_first,
        epochs,
        routers,  # type: ignore[arg-type]
        parse_memory(max_memory),
        batch_tokens,
        freeze_after=freeze_after,
    )
    if out is not None:
        made.write(out)
    points = []
    if show_frontier or plot is not None:
        points = plan_frontier(
            read,
            rank,
            made.settings.ranks,
            attention_rank,
            mlp_rank,
            epochs,
            routers,
            parse_memory(max_memory),
            batch_tokens,
            made.settings.freeze_after,
        )
    if plot is not None:
        plot_frontier(points, made, plot)
        say(f"wrote {plot}")
    if show_estimate:
        job = _job(read, rows, tokens_per_row, batch_size, epochs)
        found = [(machine, estimate_plan(made, read, job, machine)) for machine in MACHINES]
        if as_json:
            print_json({machine.name: [asdict(phase) for phase in phases] for machine, phases in found})
        else:
            print_rich(estimate_view(found, job))
    elif show_frontier and as_json:
        print_json([asdict(point) | {"boundary": point.boundary, "speedup": point.speedup} for point in points])
    elif as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_rich(frontier_view(points, made) if show_frontier else render(made))
    if out is not None:
        say(f"wrote {out}")


def _job(scores: "Scores", rows: int | None, tokens_per_row: int | None, batch_size: int, epochs: float) -> "Job":
    """What the estimate is for: as told, else like the rows that were probed."""
    from aletheia.errors import PlanError
    from aletheia.planning.estimate import Job

    for flag, value in (("--rows", rows), ("--tokens-per-row", tokens_per_row), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise PlanError(f"{flag} is {value}; expected at least 1")
    probe = scores.probe
    known = scores.data.rows if scores.data else probe.batches * probe.batch_size
    mean = max(1, probe.tokens // (probe.batches * probe.batch_size))
    return Job(rows or known, tokens_per_row or mean, probe.labelled_tokens / probe.tokens, epochs, batch_size)
