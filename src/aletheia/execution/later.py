"""Values from an asynchronous device, read without waiting for work that was queued after them."""

import torch


class Later:
    """A number that a device has yet to compute; reading it waits for nothing that was queued later."""

    def __init__(self, value: torch.Tensor) -> None:
        """Copy ``value``, a tensor of one element, which may change afterwards."""
        self._event: torch.Event | None = None
        if value.device.type == "cpu":
            self._copy = value.detach().float().clone()
            return
        self._copy = value.detach().float().to("cpu", non_blocking=True)
        self._event = torch.Event(value.device.type)
        self._event.record()

    def read(self) -> float:
        """The number; waits until the device has computed it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy.numpy())
