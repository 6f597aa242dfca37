"""The streamed probe: the same scores as the resident probe, layer by layer, for a checkpoint larger than memory.

Forward, each layer is read, run on every batch and dropped; the hidden states [B, T, D] that enter it are kept on disk.
Backward, each layer is read once more and run with gradients. So the weights are read twice, and memory holds one or
two layers at a time. Finished steps are kept in a folder, from which a killed probe resumes.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import growth_allowed
from aletheia.anatomy.fingerprint import LayerSample, identity, sample_embedding, sample_layer
from aletheia.anatomy.layerwise import hidden_states, with_hidden_states
from aletheia.anatomy.read import adds_router_loss, matrices_of, stacks_of
from aletheia.anatomy.schema import Anatomy, ModelIdentity
from aletheia.anatomy.shards import checksum
from aletheia.data.batches import labelled_tokens
from aletheia.data.examples import NO_LOSS, Examples
from aletheia.errors import ProbeError
from aletheia.probing.experts import ExpertRecorder
from aletheia.probing.ghost import GhostRecorder
from aletheia.probing.logits import labelled_logits
from aletheia.probing.scores import Scores, WeightBytes
from aletheia.probing.tally import Batch, Measured, Tally, draw, measured, other_parameters, probe_settings
from aletheia.progress import Progress, Say

HALF_SCALE = 2.0**12  # factor of the loss in float16, against underflow
LOGITS_AT_ONCE = 1 << 26  # elements: 256 MB in float32


def probe_streamed(
    checkpoint: Checkpoint,
    data: Examples | Iterable[Batch],
    batches: int = 5,
    batch_size: int = 1,
    seed: int = 0,
    work: str | Path | None = None,
    max_memory: int | None = None,
    show_progress: bool | Say = True,
) -> Scores:
    """Score every layer and module like :func:`aletheia.probing.resident.probe`, reading the weights twice.

    Args:
        checkpoint: the model on disk.
        data: as for :func:`aletheia.probing.resident.probe`.
        batches: as there.
        batch_size: as there.
        seed: as there.
        work: folder for finished steps, from which a killed probe resumes; it is removed at the end. By default a
            temporary folder.
        max_memory: bytes that the process may take in total; by default up to all free memory.
        show_progress: show progress on stderr; or a function that gets its lines.

    Raises:
        ModelError: the checkpoint is damaged, or its model cannot run layer by layer.
        ProbeError: there is no batch, memory is too small for a layer, ``work`` cannot be written, the model adds a
            router loss, or a state, loss or score is not finite.
    """
    started = time.perf_counter()
    drawn = draw(data, batches, batch_size, seed)
    used = [{name: tensor.to(checkpoint.device) for name, tensor in batch.items()} for batch in drawn]
    free = growth_allowed(checkpoint.device, max_memory)
    ahead = peak_bytes(checkpoint, used, ahead=True) <= free
    if (least := peak_bytes(checkpoint, used, ahead=False)) > free:
        raise ProbeError(
            f"the streamed probe needs {least / 1e9:.1f} GB for one layer and its activations, but may use only "
            f"{max(free, 0) / 1e9:.1f} GB; take fewer or shorter rows per batch, or `dtype` bfloat16"
        )
    if adds_router_loss(checkpoint.model):
        raise ProbeError(
            "the model adds a router loss over all layers; set output_router_logits to false in its config.json"
        )
    key = _key(checkpoint, used)
    with (
        _folder(work, key) as folder,
        Progress("probe", 2 * checkpoint.layer_count, "layers, forward and backward", show_progress) as progress,
    ):
        job = _Job(folder, key)
        _forward(checkpoint, used, job, ahead, progress)
        losses = _head(checkpoint, used, job)
        found = _backward(checkpoint, used, job, ahead, progress)
        model = _identity(checkpoint, job)
    tally = Tally(checkpoint.anatomy)
    for measured_batch in found:
        tally.add(measured_batch)
    is_drawn = isinstance(data, Examples)
    seconds = time.perf_counter() - started
    return tally.scores(
        model,
        data if isinstance(data, Examples) else None,
        probe_settings(used, losses, seed if is_drawn else None, checkpoint.dtype, checkpoint.device, seconds),
        weight_bytes(checkpoint),
    )


def weight_bytes(checkpoint: Checkpoint) -> WeightBytes:
    """Bytes of a model's parts once loaded."""
    return WeightBytes(
        layers=tuple(checkpoint.part_bytes(index) for index in range(checkpoint.layer_count)),
        outside=checkpoint.part_bytes("around") + checkpoint.head_bytes,
        embedding=checkpoint.part_bytes("embedding") if checkpoint.part_bytes("head") else 0,
    )


def peak_bytes(checkpoint: Checkpoint, used: list[Batch], ahead: bool) -> int:
    """The most bytes that the probe adds to the process: weights in memory at once, and the work on them.

    In memory are one layer, or two with ``ahead``, or the embedding, or the head and its logits. A layer is there twice
    while it is read, as stored and as cast. A layer's work is activations and gradients for the largest batch: three
    times the inputs and outputs of its matrices, four copies of the attention scores, and the Gram matrices or one
    weight gradient.
    """
    anatomy = checkpoint.anatomy
    rows, length = max((tuple(batch["input_ids"].shape) for batch in used), key=lambda shape: shape[0] * shape[1])
    labels = max(int(labelled_tokens(batch["labels"])) for batch in used)
    item = max(checkpoint.dtype.itemsize, 4)
    layers = [checkpoint.part_bytes(index) for index in range(anatomy.layer_count)]
    reading = max(checkpoint.stored_bytes(index) for index in range(anatomy.layer_count))
    states = sum(batch["input_ids"].numel() for batch in used) * anatomy.hidden_size * item
    work = max(_layer_work_bytes(anatomy, index, rows, length, item) for index in range(anatomy.layer_count))
    logits = 3 * min(labels * anatomy.vocab_size, max(LOGITS_AT_ONCE, anatomy.vocab_size)) * item
    outer = checkpoint.part_bytes("embedding"), checkpoint.head_bytes
    return 2 * states + max((2 if ahead else 1) * max(layers) + reading + work, 2 * max(outer) + logits)


def _layer_work_bytes(anatomy: Anatomy, index: int, rows: int, length: int, item: int) -> int:
    modules = anatomy.in_layer(index)
    tokens = rows * length
    widths = sum(module.features_per_token for module in modules)
    heads = max(1, anatomy.attention_width // 64)
    gradient = max((module.parameters for module in modules), default=0)
    return item * (3 * tokens * widths + 4 * rows * heads * length**2 + max(2 * tokens**2, gradient))


class _Job:
    """Finished steps, in a folder: the output of each layer, and from the head on the gradient and the measurements."""

    def __init__(self, folder: Path, key: str) -> None:
        """Keep the files in ``folder`` that have the same ``key``, and delete the others."""
        self._folder = folder
        self._key = key
        for path in folder.glob("*.safetensors"):
            if not self._is_whole(path):
                path.unlink()

    def write(self, name: str, tensors: dict[str, torch.Tensor], about: Any = None) -> None:
        """Write the file of a step, whole or not at all.

        Raises:
            ProbeError: the folder cannot be written.
        """
        path, temporary = self._folder / f"{name}.safetensors", self._folder / f".{name}-{os.getpid()}"
        try:
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            metadata = {"key": self._key, "about": json.dumps(about)}
            save_file(kept, temporary, metadata | {"checksum": checksum(kept, metadata)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ProbeError(f"cannot write to {self._folder}: {error}; free some space and run again") from error

    def has(self, name: str) -> bool:
        """Whether that step is done."""
        return (self._folder / f"{name}.safetensors").exists()

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a step."""
        with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary

    def about(self, name: str) -> Any:
        """The other results of a step."""
        with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
            return json.loads(file.metadata()["about"])

    def _is_whole(self, path: Path) -> bool:
        """Whether a file belongs to this job and is undamaged."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
        except (OSError, SafetensorError):
            return False
        return metadata.get("key") == self._key and metadata.pop("checksum", None) == checksum(kept, metadata)


@contextmanager
def _folder(work: str | Path | None, key: str) -> Iterator[Path]:
    """The folder of the job inside ``work``, removed on success; without ``work`` a temporary folder."""
    if work is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = Path(work) / key[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProbeError(f"cannot create {folder}: {error.strerror}; choose another place") from error
    yield folder
    shutil.rmtree(folder)
    with suppress(OSError):  # it holds other files
        folder.parent.rmdir()


def _key(checkpoint: Checkpoint, used: list[Batch]) -> str:
    """A sha256 of everything the work depends on: the checkpoint, its settings, and the batches."""
    digest = hashlib.sha256(checkpoint.state.encode())
    for batch in used:
        for name in ("input_ids", "attention_mask", "labels"):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode())
            digest.update(batch[name].cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _forward(checkpoint: Checkpoint, used: list[Batch], job: _Job, ahead: bool, progress: Progress) -> None:
    """Write the input of each layer, ``states-N`` for layer N, and the samples that identify the model."""
    if not job.has("states-0"):
        with checkpoint.embedding() as model:
            states = [hidden_states(*checkpoint.call(0, batch)) for batch in used]
            embedding = sample_embedding(model.get_input_embeddings().weight)
        job.write("states-0", _numbered(states), {"outputs": None, "embedding": embedding.hex()})
    start = 0
    while start < checkpoint.layer_count and job.has(f"states-{start + 1}"):
        start += 1
    checkpoint.set_outputs(job.about(f"states-{start}")["outputs"])
    states = _list(job.read(f"states-{start}"), used)
    progress.skip(start)
    for index, layer in checkpoint.read_layers(range(start, checkpoint.layer_count), ahead):
        for number, batch in enumerate(used):
            args, kwargs = with_hidden_states(*checkpoint.call(index, batch), states[number])
            states[number] = checkpoint.run(layer, args, kwargs)
            if not torch.isfinite(states[number]).all():
                raise _not_finite(f"the output of layer {index} ({checkpoint.layer_path}.{index})", number, checkpoint)
        if index == start:
            checkpoint.check_layers(used[0])
        sample = sample_layer(layer)
        fields = {name: None if value is None else value.hex() for name, value in asdict(sample).items()}
        job.write(f"states-{index + 1}", _numbered(states), {"outputs": checkpoint.outputs, "sample": fields})
        del layer
        progress.advance()


def _head(checkpoint: Checkpoint, used: list[Batch], job: _Job) -> list[float]:
    """Write the gradient at the output of the last layer, and return the loss of each batch."""
    if not job.has("backward"):
        states = _list(job.read(f"states-{checkpoint.layer_count}"), used)
        losses, gradients = [], []
        with checkpoint.head() as model:
            for number, (batch, hidden_BTD) in enumerate(zip(used, states, strict=True)):
                loss, gradient_BTD = _loss(
                    model, checkpoint.layers[0], batch, hidden_BTD, checkpoint.anatomy.vocab_size
                )
                if not math.isfinite(loss) or not torch.isfinite(gradient_BTD).all():
                    raise _not_finite("the loss, after the last layer,", number, checkpoint)
                losses.append(loss)
                gradients.append(gradient_BTD)
        job.write("backward", _numbered(gradients), {"layer": checkpoint.layer_count, "losses": losses, "found": []})
    losses_found: list[float] = job.about("backward")["losses"]
    return losses_found


def _loss(
    model: nn.Module, first: nn.Module, batch: Batch, hidden_BTD: torch.Tensor, vocab_size: int
) -> tuple[float, torch.Tensor]:
    """The model's loss for the output [B, T, D] of its last layer, and its gradient; logits in blocks."""
    leaf = hidden_BTD.detach().requires_grad_(True)
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: with_hidden_states(args, kwargs, leaf), with_kwargs=True
    )
    labelled = (nn.functional.pad(batch["labels"][:, 1:], (1, 0), value=NO_LOSS) != NO_LOSS).flatten().nonzero()
    total, gradient_BTD = 0.0, torch.zeros_like(leaf, dtype=torch.float32)
    try:
        with labelled_logits(model), torch.enable_grad():
            for chosen in labelled.squeeze(1).split(max(1, LOGITS_AT_ONCE // vocab_size)):
                labels_BT = torch.full_like(batch["labels"], NO_LOSS)
                labels_BT.view(-1)[chosen] = batch["labels"].flatten()[chosen]
                loss = model(**batch | {"labels": labels_BT}, use_cache=False).loss
                share = len(chosen) / len(labelled)
                total += share * loss.item()
                scale = HALF_SCALE if leaf.dtype == torch.float16 else 1.0
                gradient_BTD += torch.autograd.grad(loss * scale, leaf)[0].float() * (share / scale)
    finally:
        handle.remove()
    return total, gradient_BTD


def _backward(checkpoint: Checkpoint, used: list[Batch], job: _Job, ahead: bool, progress: Progress) -> list[Measured]:
    """Run each layer once more, from the last to the first, with gradients."""
    state = job.about("backward")
    found = [Measured(**item) for item in state["found"]]
    gradients = _list(job.read("backward"), used)
    progress.skip(checkpoint.layer_count - state["layer"])
    for index, layer in checkpoint.read_layers(range(state["layer"] - 1, -1, -1), ahead):
        states = _list(job.read(f"states-{index}"), used)
        found += _layer_backward(checkpoint, index, layer, used, states, gradients)
        about = {"layer": index, "losses": state["losses"], "found": [asdict(item) for item in found]}
        job.write("backward", _numbered(gradients), about)
        del layer  # before the next-but-one layer is read
        progress.advance()
    return found


def _layer_backward(
    checkpoint: Checkpoint,
    index: int,
    layer: nn.Module,
    used: list[Batch],
    states: list[torch.Tensor],
    gradients: list[torch.Tensor],
) -> list[Measured]:
    """Measure each batch's gradient in one layer; ``gradients`` at its output become those at its input."""
    path = f"{checkpoint.layer_path}.{index}"
    others = other_parameters(layer, path)
    for parameter in others.values():
        parameter.requires_grad_(True)
    found = []
    with GhostRecorder(matrices_of(layer, path)) as recorder, ExpertRecorder(stacks_of(layer, path)) as experts:
        for number, batch in enumerate(used):
            with torch.no_grad():
                call = checkpoint.call(index, batch)
            experts.mask_N = batch["attention_mask"].flatten()
            leaf = states[number].requires_grad_(True)
            output_BTD = checkpoint.run(layer, *with_hidden_states(*call, leaf))
            wanted = [*others.values(), leaf, experts.anchor]
            scale = _half_scale(gradients[number]) if leaf.dtype == torch.float16 else 1.0
            incoming_BTD = (gradients[number] * scale).to(output_BTD.dtype)
            *own, gradient_BTD, _ = torch.autograd.grad(output_BTD, wanted, incoming_BTD, allow_unused=True)
            found.append(measured(recorder, experts, dict(zip(others, own, strict=True)), scale))
            gradients[number] = gradient_BTD.float() / scale
            broken = [name for name, norm in found[-1].norms.items() if not math.isfinite(norm)]
            if broken:
                raise _not_finite(f"the gradient in layer {index} ({broken[-1]})", number, checkpoint)
    return found


def _half_scale(gradient: torch.Tensor) -> float:
    """A power of two that scales the largest element to about 1, in the middle of float16's range."""
    largest = gradient.abs().max().item()
    return 2.0 ** -math.frexp(largest)[1] if largest else 1.0


def _identity(checkpoint: Checkpoint, job: _Job) -> ModelIdentity:
    """The same identity as the resident model's."""
    samples = []
    for index in range(checkpoint.layer_count):
        fields = job.about(f"states-{index + 1}")["sample"]
        found: dict[str, Any] = {name: None if text is None else bytes.fromhex(text) for name, text in fields.items()}
        samples.append(LayerSample(**found))
    embedding = bytes.fromhex(job.about("states-0")["embedding"])
    return identity(checkpoint.name, checkpoint.anatomy, embedding, samples)


def _not_finite(what: str, number: int, checkpoint: Checkpoint) -> ProbeError:
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    return ProbeError(
        f"{what} is not finite in probe batch {number + 1}, computed in {dtype}; "
        "try `dtype` bfloat16 or float32, or check the checkpoint"
    )


def _numbered(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _list(tensors: dict[str, torch.Tensor], used: list[Batch]) -> list[torch.Tensor]:
    return [tensors[str(number)].to(batch["input_ids"].device) for number, batch in enumerate(used)]
