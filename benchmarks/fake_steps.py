"""Peak memory of a training step, and of evaluation, of a model of any size, on a machine that could not hold it.

The step runs as in ``aletheia train`` (forward, backward, clipping and AdamW), over fake tensors, which have shapes and
no data. Storages count while something refers to them. Fake tensors are on the processor, whose attention keeps the
same tensors as a GPU's; steps that only a processor takes are left out, so that the step is that of a GPU. Buffers in
kernels, the GPU's context and the overhead of its allocator are not seen. ``real=True`` takes the same step with data,
as a processor does.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import transformers.masking_utils
from peft import get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from aletheia.adapters.adapt import lora_config
from aletheia.anatomy.read import find_layers, read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.data.batches import LABELLED
from aletheia.data.examples import NO_LOSS
from aletheia.execution import loss as losses
from aletheia.execution.backend import entered, step_ways
from aletheia.planning.activations import Step
from aletheia.planning.memory import GPU_BYTES, PROCESS_BYTES, training_bytes
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.stored import PREFIX, stored_prefix
from aletheia.probing.resident import weight_bytes
from aletheia.probing.scores import WeightBytes

ONLY_ON_CPU = ("norms in fewer passes", "attention by matrix products")
BLOCK = 512  # bytes that CUDA's allocator rounds up to
NF4_BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class Kind:
    """A kind of step: a model's shape, the layers that learn, the batch and how it is computed.

    ``cached``: what enters layer ``boundary`` comes with the batch; its weights below are there all the same.
    ``held_out``: rows, and tokens of each, of a held-out batch that is evaluated after the steps.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    boundary: int
    rows: int
    row_tokens: int
    labelled_share: float = 0.55
    recompute: Any = "off"
    cached: bool = False
    nf4: bool = False
    rank: int = 16
    held_out: tuple[int, int] | None = None

    @property
    def step(self) -> Step:
        """The same step as an input of the memory model."""
        dtype = str(self.dtype).removeprefix("torch.")
        tokens = self.rows * self.row_tokens
        step = Step(tokens, self.row_tokens, self.labelled_share, dtype, self.recompute, on_gpu=True)
        if self.held_out is None:
            return step
        rows, row_tokens = self.held_out
        return replace(step, held_out=replace(step, tokens=rows * row_tokens, row_tokens=row_tokens, recompute="off"))


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a step, of them adapters and weights; and what the memory model says, its own share left out."""

    measured: int
    weights: int
    predicted: int

    @property
    def ratio(self) -> float:
        """Predicted against measured."""
        return self.predicted / self.measured


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators return for as long as they live; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def count(self, tensor: torch.Tensor) -> None:
        """Its storage, once."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return output


def peak_of(kind: Kind, real: bool = False) -> Peak:
    """Of the second step: AdamW has its moments by then."""
    with stepping(kind, real) as stepper, LiveBytes() as live:
        model = stepper.model
        for tensor in _tensors(model):
            live.count(tensor)
        held = live.now
        optimizer = torch.optim.AdamW(learning(model), fused=True)
        for _ in range(2):
            live.peak = live.now
            stepper.take(optimizer)
        if kind.held_out is not None:
            stepper.evaluate(*kind.held_out)
        ranks = {module.name: kind.rank for module in stepper.anatomy.adaptable()}
        own = GPU_BYTES if kind.step.on_gpu else PROCESS_BYTES
        layers = range(kind.boundary, stepper.anatomy.layer_count)
        predicted = training_bytes(stepper.anatomy, stepper.weights, layers, ranks, kind.step)
        return Peak(live.peak, held, predicted - own)


@dataclass(frozen=True)
class Stepper:
    """A model that is ready for steps of a kind."""

    kind: Kind
    anatomy: Anatomy
    weights: WeightBytes
    model: nn.Module

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """One step: forward, backward, clipping, optimizer."""
        batch = _batch(self.kind, self.anatomy.hidden_size)
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(learning(self.model), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, rows: int, row_tokens: int) -> None:
        """A forward pass over a held-out batch."""
        self.model.eval()
        kind = replace(self.kind, rows=rows, row_tokens=row_tokens)
        self.model(**_batch(kind, self.anatomy.hidden_size), use_cache=False)


@contextmanager
def stepping(kind: Kind, real: bool = False) -> Iterator[Stepper]:
    """Prepare steps of a kind, over fake tensors unless ``real``."""
    with ExitStack() as stack:
        anatomy, weights, model = _adapted(kind, real)
        if not real:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            _make_fake(model)
            stack.enter_context(patch.object(torch, "is_autocast_enabled", _casts))
            rows = losses.rows_at_once("cuda", kind.config.get_text_config().vocab_size)
            stack.enter_context(patch.object(losses, "ROWS_ON_CPU", rows))
            if kind.rows == 1:  # masks are made from values, and fake tensors have none
                stack.enter_context(patch.object(transformers.masking_utils, "find_packed_sequence_indices", _none))
        ways = {
            name: way
            for name, way in step_ways(model, recompute=kind.recompute).items()
            if real or name not in ONLY_ON_CPU
        }
        if kind.cached:
            stack.enter_context(stored_prefix(model, kind.boundary))
        stack.enter_context(frozen_prefix(model))
        stack.enter_context(entered(model, ways))
        yield Stepper(kind, anatomy, weights, model)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adapted(kind: Kind, real: bool) -> tuple[Anatomy, WeightBytes, nn.Module]:
    """The model with adapters; without data unless ``real``."""
    with nullcontext() if real else torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.config, dtype=kind.dtype)
    if kind.nf4:
        _pack(model)
    anatomy, weights = read_anatomy(model), weight_bytes(model)
    if kind.nf4:  # the scales describe a packed weight, and exist only once it is there
        counts = (sum(module.parameters for module in anatomy.in_layer(layer)) for layer in range(anatomy.layer_count))
        anatomy = anatomy.model_copy(update={"layer_parameters": tuple(counts)})
    wanted = [module for module in anatomy.adaptable() if module.layer >= kind.boundary]
    adapted = get_peft_model(model.eval(), lora_config(wanted, model, kind.rank, 2.0 * kind.rank))
    return anatomy, weights, adapted.train()


def _pack(model: nn.Module) -> None:
    """Put bitsandbytes' 4-bit matrices in the place of those of the layers."""
    import bitsandbytes

    for parent in list(find_layers(model)[1].modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                packed = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
                )  # fmt: skip
                size = linear.weight.numel() // 2
                packed.weight = bitsandbytes.nn.Params4bit(
                    torch.empty(size, 1, dtype=torch.uint8, device="meta"), False, quant_type="nf4", bnb_quantized=True
                )
                setattr(parent, name, packed)
    model.is_loaded_in_4bit = True


def _make_fake(model: nn.Module) -> None:
    """Give a model of the meta device fake tensors of the processor; tied weights stay so."""
    made: dict[
        int, tuple[torch.Tensor, torch.Tensor]
    ] = {}  # holds the old ones, so that none gets the place of another
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is None:
                    continue
                if id(value) not in made:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    if isinstance(value, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                    made[id(value)] = (fake, value)
                own[name] = made[id(value)][0]
        if type(module).__name__ == "Linear4bit" and "weight" in module._parameters:
            module.weight.quant_state = _scales(module)  # type: ignore[union-attr]


def _scales(linear: Any) -> Any:
    from bitsandbytes.functional import QuantState

    count = linear.in_features * linear.out_features // NF4_BLOCK
    shape = torch.Size((linear.out_features, linear.in_features))
    return QuantState(
        absmax=torch.empty(count, device="cpu"), shape=shape, code=torch.empty(16, device="cpu"), blocksize=NF4_BLOCK,
        quant_type="nf4", dtype=torch.bfloat16,
    )  # fmt: skip


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from (*model.parameters(), *model.buffers())
    for parameter in model.parameters():
        if (scales := getattr(parameter, "quant_state", None)) is not None:
            yield scales.absmax


def _batch(kind: Kind, hidden_size: int) -> dict[str, Any]:
    shape = (kind.rows, kind.row_tokens)
    batch: dict[str, Any] = {
        "input_ids": torch.ones(shape, dtype=torch.long),
        "labels": torch.ones(shape, dtype=torch.long),
    }
    unlabelled = max(1, kind.row_tokens - round(kind.row_tokens * kind.labelled_share))
    batch["labels"][:, :unlabelled] = NO_LOSS
    batch[LABELLED] = kind.rows * (kind.row_tokens - unlabelled)  # not to be seen from fake tensors
    if kind.rows > 1:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        batch["attention_mask"][0, -1] = 0
    if kind.cached:
        batch[PREFIX] = torch.zeros(*shape, hidden_size, dtype=kind.dtype)
    return batch


def _casts(device_type: str = "cpu", own: Any = torch.is_autocast_enabled) -> bool:
    """PEFT asks a GPU for this, and copies its input if the answer is no."""
    return bool(own(device_type))


def _none(*_: Any, **__: Any) -> None:
    """No mask."""
