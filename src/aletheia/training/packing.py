"""The choice of whether the batches of a run are packed, and of one size."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from aletheia.data.examples import Examples
from aletheia.errors import SettingsError
from aletheia.execution.backend import is_behind, packing_pays
from aletheia.execution.packed import why_not_packed
from aletheia.training.settings import TrainSettings


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


def check_graphs(model: PreTrainedModel | PeftModel, packed: bool, reason: str | None) -> None:
    """Check that layers can be recorded: on a device that works off a queue, for packed batches.

    Raises:
        SettingsError: they cannot.
    """
    if not is_behind(model.device):
        raise SettingsError(f"`cuda_graphs` is on, but the model is on {model.device}; expected a GPU; leave it out")
    if not packed:
        raise SettingsError(
            f"`cuda_graphs` is on, but batches are padded: {reason}; expected packed rows; leave it out"
        )
