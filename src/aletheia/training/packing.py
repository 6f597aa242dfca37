"""Whether the batches of a run are packed."""

from torch import nn

from aletheia.data.examples import Examples
from aletheia.errors import SettingsError
from aletheia.execution.backend import packing_pays
from aletheia.execution.packed import why_not_packed
from aletheia.training.settings import TrainSettings


def packs(
    model: nn.Module, data: Examples, settings: TrainSettings, is_streamed: bool = False
) -> tuple[bool, str | None]:
    """Whether they are, and why not where that could be expected.

    Args:
        model: the adapted model, which is tried.
        data: rows to train on.
        settings: what was asked for.
        is_streamed: whether layers below the boundary are not in memory.

    Raises:
        SettingsError: it is asked for and not possible.
    """
    asked = settings.packing == "on"
    if settings.packing == "off" or not (asked or packing_pays(model)):
        return False, None
    if is_streamed:
        reason: str | None = "the layers below the boundary are not in memory"
    else:
        reason = why_not_packed(model, data.examples, data.pad_token_id)
    if asked and reason is not None:
        raise SettingsError(f"`packing` is on, and {reason}; expected auto or off for this model")
    return reason is None, reason
