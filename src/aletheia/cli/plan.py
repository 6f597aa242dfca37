"""``aletheia plan``: choose from scores which modules get LoRA."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aletheia.cli.options import JsonOption, parse_memory, print_json, print_rich, say
from aletheia.cli.settings_options import Given, from_settings
from aletheia.planning.estimate import EstimateSettings
from aletheia.planning.plan import PlanSettings
from aletheia.settings import GIVEN

if TYPE_CHECKING:
    from aletheia.planning.estimate import Job
    from aletheia.planning.plan import Plan
    from aletheia.probing.scores import Scores

EXAMPLE = "aletheia plan scores.json --out plan.json --epochs 3"


@from_settings(PlanSettings, EstimateSettings)
def plan(
    scores: Annotated[Path, typer.Argument(help="Scores file, from 'aletheia probe'.", metavar="SCORES")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Plan file to write, such as plan.json.", metavar="FILE", rich_help_panel=GIVEN),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="Total memory that training may use, such as 6GB; lower layers stay frozen if it is short. "
            "(default: no limit)",
            metavar="SIZE",
        ),
    ] = None,
    batch_tokens: Annotated[
        int,
        typer.Option(
            "--batch-tokens", help="With --max-memory: tokens in the largest training batch.", metavar="INT", min=1
        ),
    ] = 4096,
    show_frontier: Annotated[
        bool,
        typer.Option("--frontier", help="Print the best choices of layers: predicted time against score."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw these choices and write them to a .svg, .png or .pdf file.", metavar="FILE"),
    ] = None,
    show_estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Print estimated memory, disk, reads and time of the whole job on typical machines."
        ),
    ] = False,
    as_json: JsonOption = False,
    *,
    given: Given,
) -> None:
    """Choose from scores which layers to adapt and with which ranks, and write a plan file."""
    from aletheia.errors import PlanError
    from aletheia.planning.make import plan as make_plan
    from aletheia.planning.make import plan_frontier, plan_targets
    from aletheia.planning.plan import Plan
    from aletheia.probing.scores import Scores
    from aletheia.reporting.frontier import check_plot, frontier_view, plot_frontier
    from aletheia.reporting.targets import targets_view
    from aletheia.reporting.terminal import render

    if out is None and not show_frontier and plot is None and not show_estimate:
        raise PlanError("nothing to do: expected --out plan.json, --frontier, --plot, --estimate, or several of them")
    if out is not None:
        Plan.check_out(out)
    if plot is not None:
        check_plot(plot)
    settings, room = PlanSettings(**given["plan"]), parse_memory(max_memory)
    estimated = EstimateSettings(**given["estimate"])
    read = Scores.read(scores)
    made = make_plan(read, settings, max_memory=room, batch_tokens=batch_tokens)
    if out is not None:
        made.write(out)
    points = []
    if show_frontier or plot is not None:
        points = plan_frontier(read, settings, max_memory=room, batch_tokens=batch_tokens)
    if plot is not None:
        plot_frontier(points, made, plot)
        say(f"wrote {plot}")
    if show_estimate:
        _print_estimate(made, read, estimated.job(read, made.settings.epochs or 1.0), as_json)
    elif show_frontier and as_json:
        print_json([asdict(point) | {"boundary": point.boundary, "speedup": point.speedup} for point in points])
    elif as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print_rich(frontier_view(points, made) if show_frontier else render(made))
        if made.reason and not show_frontier:
            print_rich(targets_view(plan_targets(read, settings, batch_tokens=batch_tokens)))
    if out is not None:
        say(f"wrote {out}")


def _print_estimate(made: "Plan", read: "Scores", job: "Job", as_json: bool) -> None:
    from aletheia.planning.estimate import MACHINES, estimate_plan
    from aletheia.reporting.estimate import estimate_view

    found = [(machine, estimate_plan(made, read, job, machine)) for machine in MACHINES]
    if as_json:
        print_json({machine.name: [asdict(phase) for phase in phases] for machine, phases in found})
    else:
        print_rich(estimate_view(found, job))
