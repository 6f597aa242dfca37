"""Low-rank corrections of the errors that quantization made in a base model's weights.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from aletheia.adapters.adapt import adapted_modules, lora_config
from aletheia.anatomy.access import base_of
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import on_device_of
from aletheia.data.examples import Example
from aletheia.errors import AdapterError
from aletheia.planning.plan import Plan

OVERSAMPLED = 8  # directions beyond the rank in the randomized decomposition
ROWS = 8  # rows whose inputs are measured
MOST_TOKENS = 4096  # in these rows, unless the first is longer


def rows_to_measure(rows: Iterable[Example]) -> list[Example]:
    """The first ``ROWS`` rows, or fewer if they are long, padding included."""
    first: list[Example] = []
    for row in rows:
        if first and (len(first) == ROWS or (len(first) + 1) * max(map(len, [*first, row])) > MOST_TOKENS):
            break
        first.append(row)
    return first


class Correction:
    """Frozen low-rank corrections of 4-bit weights, next to the adapters in training and part of them afterwards.

    Let ``E = W - Q(W)`` [O, I] be the error and X [I, N] the inputs of a weight. The correction C of rank R with the
    smallest ``||(E - C) X||_F`` is ``U Ut E``, where U [O, R] holds the leading left singular vectors of ``E X``
    (Eckart and Young). That is the minimum of QERA [arXiv:2410.06040], without the square root of the inputs' second
    moments and its inverse. LQER [arXiv:2402.02446] uses such a correction for inference, and LoftQ [arXiv:2310.08659]
    initializes the adapter with it. Here the adapter starts as usual, and the correction stays frozen.

    A context manager: leaving it removes the corrections.
    """

    def __init__(self) -> None:
        """Start with no corrections."""
        self._changes: dict[LoraLayer, torch.Tensor] = {}  # E, for the layer that is about to run
        self._factors: dict[LoraLayer, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._is_off = False

    def __enter__(self) -> "Correction":
        """Return itself; nothing changes before :meth:`measure`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the corrections from the weights."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the model without the corrections, within this context."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False

    def __len__(self) -> int:
        """How many weights are corrected."""
        return len(self._factors)

    @torch.no_grad()
    def measure(
        self, model: PeftModel, layers: Iterable[tuple[int, nn.Module]], batch: dict[str, torch.Tensor]
    ) -> None:
        """Correct every adapted 4-bit weight, at the rank of its adapter, in one forward pass.

        A weight is corrected for the inputs that the corrected weights below it produce.

        Args:
            model: the adapted model.
            layers: index and unquantized weights of the adapted decoder layers, in ascending order.
            batch: the rows to measure inputs on, as keyword arguments of ``model``.

        Raises:
            AdapterError: the adapters use rsLoRA, whose scale changes when their rank is doubled.
        """
        if model.active_peft_config.use_rslora:
            raise AdapterError(
                "`correct_quantization` and `rslora` are both on; expected one of them, because the correction "
                "doubles the rank and so changes rsLoRA's scale; turn one off"
            )
        originals = iter(layers)
        rows = on_device_of(model, batch)
        kept_N = rows["attention_mask"].flatten().bool()
        _, own_layers = find_layers(model)
        passing = []
        for index, layer in enumerate(own_layers):
            adapters = {
                name: module
                for name, module in layer.named_modules()
                if isinstance(module, LoraLayer) and _is_4bit(module.get_base_layer())
            }
            if adapters:
                see = partial(self._see_layer, originals, index, adapters, kept_N)
                passing.append(layer.register_forward_pre_hook(see))
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model(**rows, use_cache=False)
        finally:
            self._changes.clear()  # weights that no token reached stay uncorrected
            for handle in passing:
                handle.remove()

    def _see_layer(
        self,
        originals: Iterator[tuple[int, nn.Module]],
        index: int,
        adapters: dict[str, LoraLayer],
        kept_N: torch.Tensor,
        *_: object,
    ) -> None:
        """Before a layer runs, compute the errors of its weights; each is corrected when the pass reaches it."""
        original = next(layer for read, layer in originals if read == index)
        for name, module in adapters.items():
            before = original.get_submodule(name)
            weight = before.get_parameter("weight")
            weight_OI = weight.T if isinstance(before, Conv1D) else weight
            base = module.get_base_layer()
            self._changes[module] = weight_OI.float() - dequantize_module_weight(base).float()
            # the pass has not reached it yet, so its first call is corrected, too
            self._handles.append(base.register_forward_hook(partial(self._correct, module, kept_N)))

    def _correct(
        self,
        module: LoraLayer,
        kept_N: torch.Tensor,
        _: nn.Module,
        args: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """The output of a base weight with its correction; the first call computes the correction."""
        x = args[0]
        if module in self._changes:
            x_NI = x.flatten(0, -2)
            x_NI = x_NI[kept_N] if len(x_NI) == len(kept_N) else x_NI
            rank = module.r[module.active_adapters[0]]
            a_RI, b_OR = _factors(self._changes.pop(module), x_NI.float(), rank)
            self._factors[module] = a_RI.to(x.dtype), b_OR.to(x.dtype)
        if module not in self._factors or self._is_off:
            return output
        a_RI, b_OR = self._factors[module]
        return output + ((x @ a_RI.to(x.dtype).T) @ b_OR.to(x.dtype).T).to(output.dtype)

    @torch.no_grad()
    def fold(self, model: PeftModel, plan: Plan) -> None:
        """Append the corrections to the adapters, as more rows of A and columns of B: twice the plan's rank.

        Call it after training, outside the context. The model then computes what it did inside.
        """
        if not self._factors:
            return
        for module, (a_RI, b_OR) in self._factors.items():
            name = module.active_adapters[0]
            lora_a, lora_b = module.lora_A[name], module.lora_B[name]
            own_a_RI, own_b_OR = lora_a.get_parameter("weight"), lora_b.get_parameter("weight")
            lora_a.weight = nn.Parameter(torch.cat([own_a_RI, a_RI.to(own_a_RI)]))
            lora_b.weight = nn.Parameter(torch.cat([own_b_OR, b_OR.to(own_b_OR) / module.scaling[name]], dim=1))
            module.r[name] *= 2
            module.lora_alpha[name] *= 2  # the scale is their ratio
            lora_a.out_features = lora_b.in_features = module.r[name]
        rank, alpha = 2 * plan.settings.rank, 2 * plan.settings.common_alpha
        config = lora_config(plan.adapters, base_of(model), rank, alpha, adapted_modules(model))
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(model.active_peft_config, field, getattr(config, field))


def _is_4bit(base: nn.Module) -> bool:
    return hasattr(getattr(base, "weight", None), "quant_state")


def _factors(error_OI: torch.Tensor, x_NI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``Ut E`` [R, I] and U [O, R], padded with zeros where there are fewer than R directions."""
    change_NO = x_NI @ error_OI.T
    count = min(rank + OVERSAMPLED, *change_NO.shape)
    u_OR = torch.svd_lowrank(change_NO, q=count, niter=2)[2][:, :rank]
    u_OR = nn.functional.pad(u_OR, (0, rank - u_OR.shape[1]))
    return u_OR.T @ error_OI, u_OR
