"""``aletheia plan``: from scores to the modules that get LoRA."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aletheia.cli.options import JsonOption, MaxMemoryOption, SeedOption, parse_memory, print_json, print_rich, say

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
    max_memory: MaxMemoryOption = None,
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
    as_json: JsonOption = False,
) -> None:
    """Choose layers and ranks from scores and write them as a plan, or print the frontier of all choices."""
    from aletheia.errors import PlanError
    from aletheia.planning.make import plan as make_plan
    from aletheia.planning.make import plan_frontier
    from aletheia.probing.scores import Scores
    from aletheia.reporting.frontier import check_plot, frontier_view, plot_frontier
    from aletheia.reporting.terminal import render

    if out is None and not show_frontier and plot is None:
        raise PlanError("nothing to do: expected --out plan.json, --frontier, --plot, or several of them")
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
    )
    if out is not None:
        made.write(out)
    points = []
    if show_frontier or plot is not None:
        points = plan_frontier(read, rank, made.settings.ranks, attention_rank, mlp_rank, epochs)
    if plot is not None:
        plot_frontier(points, made, plot)
        say(f"wrote {plot}")
    if show_frontier and as_json:
        print_json([asdict(point) | {"boundary": point.boundary, "speedup": point.speedup} for point in points])
    elif as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_rich(frontier_view(points, made) if show_frontier else render(made))
    if out is not None:
        say(f"wrote {out}")
