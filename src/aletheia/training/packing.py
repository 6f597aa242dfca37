"""The choice of whether the batches of a run are packed, and of one size."""

from torch import nn

from aletheia.data.examples import Examples
from aletheia.errors import SettingsError
from aletheia.execution.backend import is_behind, packing_pays
from aletheia.execution.packed import why_not_packed
from aletheia.progress import Say
from aletheia.training.loop import RowTrainer
from aletheia.training.settings import TrainSettings
from aletheia.training.sharded import is_sharded


def packs(
    model: nn.Module, data: Examples, settings: TrainSettings, is_streamed: bool = False
) -> tuple[bool, str | None]:
    """Whether batches are packed; and the reason if they are not, where one would expect it.

    Args:
        model: the adapted model, on which packing is tried.
        data: rows to train on.
        settings: settings of the run.
        is_streamed: whether layers below the boundary are not in memory.

    Raises:
        SettingsError: ``packing`` is on, but not possible.
    """
    asked = settings.packing == "on"
    if settings.packing == "off" or not (asked or packing_pays(model)):
        return False, None
    if is_streamed:
        reason: str | None = "the layers below the boundary are not in memory"
    else:
        reason = why_not_packed(model, data.examples, data.pad_token_id)
    if asked and reason is not None:
        raise SettingsError(f"`packing` is on, but {reason}; expected auto or off for this model")
    return reason is None, reason


def recorded_tokens(trainer: RowTrainer, settings: TrainSettings, say: Say) -> int | None:
    """The tokens of the batches whose layers are recorded as CUDA graphs; None if none are.

    Raises:
        SettingsError: ``cuda_graphs`` is on, but the run is on a CPU or pads its batches.
    """
    if trainer.size is None:
        return None
    if not is_behind(trainer.args.device):
        raise SettingsError(
            f"`cuda_graphs` is on, but the model is on {trainer.args.device}; expected a GPU; leave it out"
        )
    if settings.packing == "off":
        raise SettingsError("`cuda_graphs` is on, but batches are padded; expected packed rows; leave it out")
    several = trainer.args.world_size > 1 or is_sharded(trainer)
    if several or settings.recompute != "off":
        say(f"graphs off: {'several processes train' if several else 'activations are computed again'}")
        trainer.size = None
        return None
    return trainer.size.tokens
