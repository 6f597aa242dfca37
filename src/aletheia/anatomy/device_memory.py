"""Memory of the device in bytes: total, free, and held by this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

GROUPS = Path("/sys/fs/cgroup")  # control groups of containers, batch systems and services
OWN_GROUP = Path("/proc/self/cgroup")
VERSION_2, VERSION_1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
USABLE_SHARE = {"cuda": 0.9, "cpu": 0.8}  # of all memory; the rest is for the system and other processes


def usable_memory_bytes(device: torch.device) -> int:
    """Bytes that a job may take of ``device``: a fixed share of all, so that equal machines decide alike."""
    return int(usable_share(device) * total_memory_bytes(device))


def usable_share(device: torch.device) -> float:
    """The share of a device's memory that a job may take, between 0 and 1."""
    return USABLE_SHARE.get(device.type, USABLE_SHARE["cpu"])


def total_memory_bytes(device: torch.device) -> int:
    """All bytes of a GPU; else of the system, or the lower limit of a control group around this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def free_memory_bytes(device: torch.device | None = None) -> int:
    """Free bytes of a GPU; else of the system, or of a control group (container, batch job) if that has less."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())])


def own_memory_bytes(device: torch.device) -> int:
    """Bytes that this process holds on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def growth_allowed(device: torch.device, max_memory: int | None) -> int:
    """Bytes by which this process may still grow on ``device``: up to ``max_memory`` in total, or all that is free."""
    return free_memory_bytes(device) if max_memory is None else max_memory - own_memory_bytes(device)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group of this process with a limit; cached files do not count as used."""
    for folder, names in _groups():
        with suppress(OSError, ValueError):  # no control group, or no limit in it ("max")
            limit, used = (int((folder / name).read_text()) for name in names)
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield limit, used - int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def _groups() -> list[tuple[Path, tuple[str, str]]]:
    """The folders of this process's control group and of its parents, with the file names of limit and use.

    Inside a container the process's own group is the outermost.
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
