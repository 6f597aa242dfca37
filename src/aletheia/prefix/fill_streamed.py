"""The prefix cache of a model larger than memory: all rows go through one layer at a time.

Shapes: B rows of the batch, T tokens of its longest row, D model width.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import growth_allowed
from aletheia.anatomy.layerwise import hidden_states, with_hidden_states
from aletheia.anatomy.read import adds_router_loss
from aletheia.anatomy.shards import checksum
from aletheia.data.batches import collate
from aletheia.data.examples import Example
from aletheia.errors import CacheError
from aletheia.execution.backend import fast_layers
from aletheia.prefix.cache import DiskCache, check_space, distinct_tokens, row_key
from aletheia.prefix.cache_folders import CacheInfo, default_cache_dir
from aletheia.progress import Progress, Say

Batch = dict[str, torch.Tensor]


def streamed_cache(checkpoint: Checkpoint, boundary: int, folder: Path | None = None) -> DiskCache:
    """The cache on disk for the inputs of layer ``boundary``, not filled yet.

    Its key covers :attr:`aletheia.Checkpoint.state` and the boundary.

    Raises:
        CacheError: layer 0 is adapted, the model adds a router loss, or the folder cannot be used.
    """
    if boundary == 0:
        raise CacheError("layer 0 is adapted, so there is no frozen prefix; expected a plan that leaves it out")
    if adds_router_loss(checkpoint.model):
        raise CacheError(
            "the model adds a router loss over all layers; expected none; set output_router_logits false in its config"
        )
    info = CacheInfo(
        model=checkpoint.name,
        key=hashlib.sha256(f"{checkpoint.state} {boundary}".encode()).hexdigest(),
        boundary=boundary,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        width=checkpoint.anatomy.hidden_size,
    )
    return DiskCache(folder or default_cache_dir(), info)


@torch.no_grad()
def fill_streamed(
    checkpoint: Checkpoint,
    boundary: int,
    rows: Sequence[Example],
    cache: DiskCache,
    batch_size: int,
    pad_token_id: int,
    max_memory: int | None = None,
    show_progress: bool | Say = True,
) -> int:
    """Store the rows that ``cache`` lacks, reading each layer below ``boundary`` once; returns how many there were.

    Between layers, the states of a batch are in a file in the cache folder, which is always replaced as a whole. So a
    build that was killed continues with the batch and layer it had reached. One that was killed while copying these
    files into the cache computes the missing rows again.

    Args:
        checkpoint: the model, whose layers are read from disk one at a time.
        boundary: the layer whose inputs are stored.
        rows: rows to store.
        cache: the cache of :func:`streamed_cache`.
        batch_size: rows per batch.
        pad_token_id: token id of the padding.
        max_memory: bytes that this may take; None: what is free.
        show_progress: print progress on stderr, or call this function with a line now and then.

    Raises:
        CacheError: the disk is too small, a layer is random, or a value is not finite.
        ModelError: the checkpoint is damaged.
    """
    with FileLock(cache.folder / "fill.lock"):  # another run may be filling the same cache
        cache.refresh()
        missing = sorted(cache.missing(rows), key=len, reverse=True)
        if missing:
            _fill(checkpoint, boundary, missing, cache, batch_size, pad_token_id, max_memory, show_progress)
    return len(missing)


def _fill(
    checkpoint: Checkpoint,
    boundary: int,
    missing: list[Example],
    cache: DiskCache,
    batch_size: int,
    pad_token_id: int,
    max_memory: int | None,
    show_progress: bool | Say,
) -> None:
    width = checkpoint.anatomy.hidden_size * checkpoint.dtype.itemsize
    groups = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    work = cache.folder / f"partial-{_key(missing, batch_size)[:16]}"
    for other in cache.folder.glob("partial-*"):
        if other != work:  # left by a build of other rows or batches
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(exist_ok=True)
    states = [_States(work / f"{number:06d}.safetensors") for number in range(len(groups))]
    done = sum(len(row) for state, group in zip(states, groups, strict=True) if state.layer >= 0 for row in group)
    check_space(cache.folder, (2 * distinct_tokens(missing) - done) * width)
    largest = max(checkpoint.part_bytes(index) + checkpoint.stored_bytes(index) for index in range(boundary))
    room = growth_allowed(checkpoint.device, max_memory)
    if largest > room:
        raise CacheError(
            f"filling the cache needs {largest / 1e9:.1f} GB of memory for one layer, but {room / 1e9:.1f} GB may be "
            "used; expected at least that; allow more memory"
        )
    ahead = 2 * largest <= room
    first = max(0, min(state.layer for state in states))
    with Progress("cache", boundary, "layers", show_progress, done=first) as progress:
        if any(state.layer < 0 for state in states):
            with checkpoint.embedding():
                for state, group in zip(states, groups, strict=True):
                    if state.layer < 0:
                        call = checkpoint.call(0, _batch(checkpoint, group, pad_token_id))
                        state.write(0, _checked(hidden_states(*call), checkpoint), None)
        checkpoint.set_outputs(states[0].outputs)
        for index, layer in checkpoint.read_layers(range(first, boundary), ahead):
            _check_repeats(checkpoint, index, layer, states, groups, pad_token_id)
            if index == first:
                checkpoint.check_layers(_batch(checkpoint, groups[-1], pad_token_id))
            with fast_layers(layer, liger=False):  # runs with and without Liger share the folder; reading takes longer
                for state, group in zip(states, groups, strict=True):
                    if state.layer == index:
                        hidden_BTD = _run(checkpoint, index, layer, state, group, pad_token_id)
                        if not torch.isfinite(hidden_BTD).all():
                            raise CacheError(
                                f"layer {index} gives a value that is not finite for {group[0].where} or a row in its "
                                "batch; expected finite values; set `dtype` bfloat16 or float32"
                            )
                        state.write(index + 1, hidden_BTD, checkpoint.outputs)
            del layer
            progress.advance()
    for state, group in zip(states, groups, strict=True):
        for row, hidden_TD in zip(group, state.read(torch.device("cpu")), strict=True):
            cache.put(row, hidden_TD[: len(row)])
    shutil.rmtree(work)


class _States:
    """The states of one batch on disk, the layer they enter (-1: no states yet), and the form of a layer's output."""

    def __init__(self, path: Path) -> None:
        """Read the file if it exists and is intact."""
        self._path = path
        self.layer: int = -1
        self.outputs: list[bool] | None = None
        try:
            with safe_open(path, framework="pt") as file:
                about, states_BTD = file.metadata() or {}, file.get_tensor("states")
            if about.pop("checksum", None) == checksum({"states": states_BTD}, about):
                self.layer, self.outputs = int(about["layer"]), json.loads(about["outputs"])
        except (OSError, SafetensorError):
            pass

    def read(self, device: torch.device) -> torch.Tensor:
        """The states [B, T, D]."""
        with safe_open(self._path, framework="pt") as file:
            states_BTD: torch.Tensor = file.get_tensor("states")
        return states_BTD.to(device)

    def write(self, layer: int, hidden_BTD: torch.Tensor, outputs: list[bool] | None) -> None:
        """Replace the states by those that enter ``layer``."""
        temporary = self._path.with_suffix(".new")
        kept = {"states": hidden_BTD.cpu().contiguous()}
        about = {"layer": str(layer), "outputs": json.dumps(outputs)}
        try:
            save_file(kept, temporary, about | {"checksum": checksum(kept, about)})
            os.replace(temporary, self._path)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"cannot write to {self._path.parent}: {error}; free some space and run again") from error
        self.layer, self.outputs = layer, outputs


def _run(
    checkpoint: Checkpoint, index: int, layer: nn.Module, state: _States, group: list[Example], pad_token_id: int
) -> torch.Tensor:
    batch = _batch(checkpoint, group, pad_token_id)
    call = checkpoint.call(index, batch)
    return checkpoint.run(layer, *with_hidden_states(*call, state.read(checkpoint.device)))


def _check_repeats(
    checkpoint: Checkpoint,
    index: int,
    layer: nn.Module,
    states: list[_States],
    groups: list[list[Example]],
    pad_token_id: int,
) -> None:
    """Check that a layer gives the same output twice in training mode; with dropout, stored states are not exact."""
    number = next((number for number, state in reversed(list(enumerate(states))) if state.layer == index), None)
    if number is None:
        return
    with torch.random.fork_rng():
        layer.train()
        one, other = (_run(checkpoint, index, layer, states[number], groups[number], pad_token_id) for _ in range(2))
        layer.eval()
    if (one.float() - other.float()).norm() > 1e-3 * one.float().norm():
        raise CacheError(f"layer {index} is random (dropout); expected none; set dropout to 0 in the model's config")


def _checked(hidden_BTD: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    if hidden_BTD.dim() != 3 or hidden_BTD.dtype != checkpoint.dtype:
        raise CacheError(
            f"the embedding of {type(checkpoint.model).__name__} gives {hidden_BTD.dtype} [{_by(hidden_BTD.shape)}], "
            f"so the model cannot be streamed; expected {checkpoint.dtype} with three dimensions; load it as a whole"
        )
    return hidden_BTD


def _by(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _batch(checkpoint: Checkpoint, group: list[Example], pad_token_id: int) -> Batch:
    return {name: tensor.to(checkpoint.device) for name, tensor in collate(group, pad_token_id).items()}


def _key(rows: Sequence[Example], batch_size: int) -> str:
    digest = hashlib.sha256(str(batch_size).encode())
    for row in rows:
        digest.update(row_key(row.input_ids).encode())
    return digest.hexdigest()
