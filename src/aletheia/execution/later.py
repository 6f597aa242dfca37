"""Values on their way from a device that is behind: read without waiting for what was queued after them."""

import torch


class Later:
    """A number that a device is to compute; reading it waits for nothing that was queued later."""

    def __init__(self, value: torch.Tensor) -> None:
        """``value`` has one element; it may change from now on."""
        self._event: torch.Event | None = None
        if value.device.type == "cpu":
            self._copy = value.detach().float().clone()
            return
        self._copy = value.detach().float().to("cpu", non_blocking=True)
        self._event = torch.Event(value.device.type)
        self._event.record()

    def read(self) -> float:
        """The number, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy.numpy())
