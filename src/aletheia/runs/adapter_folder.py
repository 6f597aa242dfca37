"""An adapter as its folder describes it, whoever trained it: layers, ranks, base, and losses if they are stored."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from aletheia.planning.plan import Adapter
from aletheia.runs.schema import Run

Curve = tuple[tuple[int, float], ...]  # (step, loss in nats per token)


class AdapterFolder(BaseModel):
    """A LoRA adapter folder as plain data; needs no plan and no metrics.

    Attributes:
        path: the folder.
        base: the base model that its config names; None where it names none.
        rank: the common rank; single modules may have others.
        alpha: the common alpha.
        rslora: whether alpha is divided by the square root of the rank.
        dropout: dropout of the adapters in training.
        adapters: the adapted weights of the layers; for fused experts, one entry for each pair of factors.
        outside: adapted modules outside the layers, such as the head.
        beside: settings beyond plain LoRA, by PEFT's names.
        parameters: how many numbers are stored, those of ``beside`` included.
        made_with: the version of PEFT that wrote it.
        train_curve: training loss by step; empty if the folder has no Trainer state.
        held_out_curve: the loss on held-out rows by step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: Path
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    adapters: tuple[Adapter, ...]
    outside: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    parameters: int = 0
    made_with: str | None = None
    train_curve: Curve = ()
    held_out_curve: Curve = ()

    @classmethod
    def of_run(cls, run: Run) -> "AdapterFolder":
        """The adapter of a finished run."""
        metrics, settings = run.metrics, run.plan.settings
        return cls(
            path=run.path,
            base=metrics.model.name,
            rank=settings.rank,
            alpha=settings.common_alpha,
            rslora=settings.rslora,
            dropout=settings.dropout,
            adapters=run.plan.adapters,
            parameters=metrics.trainable_parameters,
            made_with=metrics.packages.get("peft"),
            train_curve=tuple((point.step, point.loss) for point in metrics.train_curve),
            held_out_curve=tuple((point.step, point.loss) for point in metrics.held_out_curve),
        )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have adapters."""
        return tuple(sorted({adapter.layer for adapter in self.adapters}))

    @property
    def layer_count(self) -> int:
        """Layers up to the highest adapted one; the folder does not say how many the model has."""
        return max(self.layers, default=-1) + 1
