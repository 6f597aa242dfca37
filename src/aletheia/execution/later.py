"""Values from an asynchronous device, read without waiting for work that was queued after them."""

import torch


class Later:
    """Values that a device has yet to compute; reading them waits for nothing that was queued later."""

    def __init__(self, value: torch.Tensor) -> None:
        """Copy ``value``, which may change afterwards."""
        self._event: torch.Event | None = None
        self._copy = value.detach().to("cpu", non_blocking=True, copy=True)
        if value.device.type != "cpu":
            self._event = torch.Event(value.device.type)
            self._event.record()

    def tensor(self) -> torch.Tensor:
        """The values, on the CPU; waits until the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy

    def read(self) -> float:
        """The number, if it is one; waits until the device has computed it."""
        return float(self.tensor().float().numpy())
