"""Fine-tune only the layers of a language model that the task needs.

A whole run, step by step::

    import aletheia

    base = aletheia.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    data, held_out = aletheia.split_held_out(aletheia.load_data("train.jsonl", base.tokenizer))
    scores = aletheia.probe(base.model, data)
    plan = aletheia.plan(scores)
    model = aletheia.adapt(base.model, plan)
    run = aletheia.train(model, data, plan, out="run", held_out=held_out)
    aletheia.report([run], "report.html")

Importing the package does not load torch; each name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "aletheia.anatomy.schema",
    "Checkpoint": "aletheia.anatomy.checkpoint",
    "DryRun": "aletheia.planning.outlook",
    "Evaluated": "aletheia.lab.evaluation.record",
    "Examples": "aletheia.data.examples",
    "Loaded": "aletheia.anatomy.load",
    "Plan": "aletheia.planning.plan",
    "Run": "aletheia.runs.schema",
    "Scores": "aletheia.probing.scores",
    "Answer": "aletheia.runs.answers",
    "AttachSettings": "aletheia.training.attach",
    "DataSettings": "aletheia.data.settings",
    "GenerateSettings": "aletheia.runs.answers",
    "LoadSettings": "aletheia.anatomy.settings",
    "PlanSettings": "aletheia.planning.plan",
    "RunFolder": "aletheia.runs.folder",
    "TrainSettings": "aletheia.training.settings",
    "adapt": "aletheia.adapters.adapt",
    "attach": "aletheia.training.attach",
    "calibrate": "aletheia.training.calibrate",
    "compare": "aletheia.lab.evaluation.against",
    "dry_run": "aletheia.job.dry_run",
    "eval_settings": "aletheia.lab.evaluation.evaluate",
    "evaluate": "aletheia.lab.evaluation.evaluate",
    "export": "aletheia.runs.exports.export",
    "fine_tune": "aletheia.job.fine_tune",
    "fast_steps": "aletheia.training.fast_steps",
    "frozen_prefix": "aletheia.prefix.boundary",
    "generate": "aletheia.job.generate",
    "held_out_loss": "aletheia.training.held_out",
    "inspect": "aletheia.anatomy.load",
    "load": "aletheia.anatomy.load",
    "load_adapter": "aletheia.runs.saved",
    "load_data": "aletheia.data.encode",
    "plan": "aletheia.planning.make",
    "plan_frontier": "aletheia.planning.make",
    "preview": "aletheia.job.preview",
    "probe": "aletheia.probing.resident",
    "probe_streamed": "aletheia.probing.streamed",
    "push": "aletheia.job.push",
    "report": "aletheia.reporting.page",
    "split_held_out": "aletheia.data.examples",
    "train": "aletheia.training.train",
}

__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from aletheia.adapters.adapt import adapt
    from aletheia.anatomy.checkpoint import Checkpoint
    from aletheia.anatomy.load import Loaded, inspect, load
    from aletheia.anatomy.schema import Anatomy
    from aletheia.anatomy.settings import LoadSettings
    from aletheia.data.encode import load_data
    from aletheia.data.examples import Examples, split_held_out
    from aletheia.data.settings import DataSettings
    from aletheia.job.dry_run import dry_run
    from aletheia.job.fine_tune import fine_tune
    from aletheia.job.generate import generate
    from aletheia.job.preview import preview
    from aletheia.job.push import push
    from aletheia.lab.evaluation.against import compare
    from aletheia.lab.evaluation.evaluate import eval_settings, evaluate
    from aletheia.lab.evaluation.record import Evaluated
    from aletheia.planning.make import plan, plan_frontier
    from aletheia.planning.outlook import DryRun
    from aletheia.planning.plan import Plan, PlanSettings
    from aletheia.prefix.boundary import frozen_prefix
    from aletheia.probing.resident import probe
    from aletheia.probing.scores import Scores
    from aletheia.probing.streamed import probe_streamed
    from aletheia.reporting.page import report
    from aletheia.runs.answers import Answer, GenerateSettings
    from aletheia.runs.exports.export import export
    from aletheia.runs.folder import RunFolder
    from aletheia.runs.saved import load_adapter
    from aletheia.runs.schema import Run
    from aletheia.training.attach import AttachSettings, attach
    from aletheia.training.calibrate import calibrate
    from aletheia.training.fast_steps import fast_steps
    from aletheia.training.held_out import held_out_loss
    from aletheia.training.settings import TrainSettings
    from aletheia.training.train import train


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'aletheia' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
