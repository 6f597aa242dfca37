"""Memory of the device: all of it, what is free, what this process holds."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GROUPS = Path("/sys/fs/cgroup")  # control groups of containers, batch systems and services
OWN_GROUP = Path("/proc/self/cgroup")
VERSION_2, VERSION_1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.8}  # of all memory, for training: the rest is the system's and others'


def usable_memory_bytes(device: torch.device) -> int:
    """What a job may take of ``device``: a fixed share of all, so that equal machines decide alike."""
    return int(usable_share(device) * total_memory_bytes(device))


def usable_share(device: torch.device) -> float:
    """The part of a device's memory that a job may take."""
    return USABLE_SHARE.get(device.type, USABLE_SHARE["cpu"])


def total_memory_bytes(device: torch.device) -> int:
    """All memory of a GPU; else of the system, or the limit of a control group that this process is in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def free_memory_bytes(device: torch.device | None = None) -> int:
    """What a GPU has left; else the system, or its control group, where that is less (containers, batch systems)."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())])


def own_memory_bytes(device: torch.device) -> int:
    """What this process holds on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def growth_allowed(device: torch.device, max_memory: int | None) -> int:
    """Bytes by which this process may still grow on ``device``: to ``max_memory`` in all, or what is free."""
    return free_memory_bytes(device) if max_memory is None else max_memory - own_memory_bytes(device)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of every control group of this process that has a limit; files read before do not count as used."""
    for folder, names in _groups():
        with suppress(OSError, ValueError):  # no control group, or no limit in it ("max")
            limit, used = (int((folder / name).read_text()) for name in names)
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit, used - int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def _groups() -> list[tuple[Path, tuple[str, str]]]:
    """The folders of this process's group and of those around it, with the names of limit and use.

    In a container its own group is the outermost.
    """
    found = [(GROUPS, VERSION_2), (GROUPS / "memory", VERSION_1)]
    with suppress(OSError, ValueError):
        for line in OWN_GROUP.read_text().splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0" or "memory" in kinds.split(","):  # version 2 has one tree for all
                root, names = found[0] if number == "0" else found[1]
                inside = Path(path.strip("/"))
                found += [(root / part, names) for part in (inside, *inside.parents) if part != Path()]
    return found
