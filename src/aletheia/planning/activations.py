"""What a training step holds beside weights and adapters, in bytes: activations kept for backward, logits, gradients.

Counted is what autograd saves, layer by layer, for a token: inputs and outputs of matrices, what norms and activations
keep, the three sides of attention. The counts were made by running steps on fake tensors, see
``benchmarks/memory_estimates.py``, which also sets them beside what a GPU measured.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from aletheia.anatomy.schema import Anatomy, Kept, Module

Recompute = Literal["off", "selective", "full"]
FLOAT32_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SQUARE_WORK_BYTES = 8  # a score of attention that keeps them, in backward: two in float32
PLAIN_HALF = 2.25  # gradients where PEFT adds its products itself in half precision, against where they share a buffer
PLAIN_INPUTS = 3  # hidden states that PEFT rounds for each matrix anew on a processor, of those that share one
NORM_GRADIENTS = 4  # hidden states in float32 that the backward pass of a norm holds
MOST_SCORES_KEPT = 2**16  # of a head, by attention on a processor: aletheia.execution.cpu.attention.MOST_KEPT
LOSS_ROWS = {True: 4096, False: 32}  # of logits in float32 at once, on a GPU or not: aletheia.execution.fast
HALF_LOSS_BYTES = 12  # of a float16 logit: it, its logarithm and its gradient in float32
SCANNED = 2  # inputs and outputs of a layer without attention: states along the tokens, not counted one by one
SLACK = 1.05  # small tensors that are not counted, and what an allocator rounds up


@dataclass(frozen=True)
class Step:
    """The largest training step of a run, and how it is computed.

    Attributes:
        tokens: of the batch, padding included.
        row_tokens: of its longest row; a batch of several rows is taken to need padding.
        labelled_share: of the tokens, at most.
        dtype: of the activations: that of the model, or what its quantized weights are multiplied in.
        recompute: what backward computes again.
        on_gpu: whether it runs on a GPU.
        resident: whether the weights below the boundary are in memory, as they are unless the model is streamed; a
            prefix that is freed once it is cached is there at first. None: not known yet.
    """

    tokens: int
    row_tokens: int
    labelled_share: float = 1.0
    dtype: str = "bfloat16"
    recompute: Recompute = "off"
    on_gpu: bool = False
    resident: bool | None = None

    @property
    def item_bytes(self) -> int:
        """Of an activation."""
        return ITEM_BYTES.get(self.dtype, FLOAT32_BYTES)

    @property
    def is_padded(self) -> bool:
        """Whether rows of unlike length are in it."""
        return self.tokens > self.row_tokens


@dataclass(frozen=True)
class LayerWork:
    """What a layer keeps in a step of a model, in bytes."""

    anatomy: Anatomy
    step: Step
    layer: int
    ranks: Mapping[str, int]

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The layer's matrices."""
        return self.anatomy.in_layer(self.layer)

    @cached_property
    def kept(self) -> Kept:
        """Of the model; where the probe did not ask, norms and activations like Gemma's, with some per head."""
        if self.anatomy.kept is not None:
            return self.anatomy.kept
        wide = 4.0 * self.anatomy.hidden_size + 2.0 * self.anatomy.attention_width
        return Kept(
            norms=(0.0,) * self.anatomy.layer_count,
            wide_norms=(wide,) * self.anatomy.layer_count,
            heads=self.anatomy.attention_width // 64,
        )

    @property
    def is_masked(self) -> bool:
        """Whether attention gets a mask, for which keys and values are repeated: of padding, or of a window."""
        return self.step.is_padded or 0 < self.kept.window < self.step.row_tokens

    @property
    def has_attention(self) -> bool:
        """Whether some matrix of it belongs to attention."""
        return any(module.role == "attention" for module in self.modules)

    @property
    def everything_bytes(self) -> float:
        """What it keeps where nothing is computed again."""
        by_role: dict[str, list[Module]] = {}
        for module in self.modules:
            by_role.setdefault(module.role, []).append(module)
        own = self.kept.norms[self.layer] + self._reduced
        wide = self.kept.wide_norms[self.layer]
        for role, modules in by_role.items():
            own += self._attention(modules) if role == "attention" else _feed_forward(modules)
            if role != "attention":
                own += self.kept.activation * _width_in(modules[-1])
                wide += self.kept.wide_activation * _width_in(modules[-1])
        if self.kept.plain_products and not self.step.on_gpu and self.step.dtype != "float32":
            own += PLAIN_INPUTS * self.anatomy.hidden_size
        per_token = self.step.item_bytes * own + FLOAT32_BYTES * wide
        if not self.has_attention:
            features = sum(module.features_per_token for module in self.modules)
            per_token = max(per_token, FLOAT32_BYTES * SCANNED * features)
        return SLACK * self.step.tokens * (per_token + self._attention_bytes)

    @property
    def products_bytes(self) -> float:
        """What it keeps where all but products and attention is computed again; twice where LoRA adds its own."""
        copies = 2 if self.kept.plain_products else 1
        outputs = copies * sum(module.out_features * module.active_experts for module in self.modules)
        own = outputs + self.anatomy.hidden_size + self._reduced
        own += self.anatomy.attention_width if self.has_attention else 0
        return SLACK * self.step.tokens * (self.step.item_bytes * own + FLOAT32_BYTES * self.kept.heads)

    @property
    def input_bytes(self) -> float:
        """What enters it: all that is kept where the layer is computed again."""
        return SLACK * self.step.tokens * self.step.item_bytes * self.anatomy.hidden_size

    @property
    def backward_bytes(self) -> float:
        """Gradients of activations at once, on the way through its widest part, and what recomputing it holds."""
        widest = max(map(_width_in, self.modules), default=0)
        gradients = self.step.item_bytes * (2.0 * widest + self.anatomy.hidden_size)
        if self.kept.plain_products and self.step.dtype != "float32":
            gradients *= PLAIN_HALF
        if self.kept.square_copies and self.has_attention:
            gradients += SQUARE_WORK_BYTES * self.kept.heads * self.step.row_tokens
        again = {"off": 0.0, "selective": self.everything_bytes - self.products_bytes, "full": self.everything_bytes}
        return self.step.tokens * gradients + max(0.0, again[self.step.recompute])

    @property
    def held_bytes(self) -> float:
        """What it keeps from forward to backward."""
        if self.step.recompute == "full":
            return self.input_bytes
        return self.products_bytes if self.step.recompute == "selective" else self.everything_bytes

    @property
    def _reduced(self) -> float:
        """Low-rank products of a token."""
        return float(sum(self.ranks.get(module.name, 0) * module.active_experts for module in self.modules))

    def _attention(self, modules: Sequence[Module]) -> float:
        """Inputs of the projections once each, queries, keys and values, and what goes into the last projection.

        With padding, keys and values are repeated to the width of the queries; latent ones are put together anew.
        """
        *inner, last = modules
        outputs = sum(module.out_features for module in inner)
        width = self.anatomy.attention_width
        sides = 3 * width if self.is_masked else 0
        is_latent = len(inner) > 3
        outputs = outputs + sides if is_latent else max(outputs, sides)
        outputs += width if len(inner) == 1 else 0  # values that are part of one product keep all of it
        return sum({module.in_features for module in inner}) + outputs + last.in_features

    @property
    def _attention_bytes(self) -> float:
        """For a token: sums of scores in float32; the mask of padded rows as numbers to add; scores that are kept."""
        if not self.has_attention:
            return 0.0
        step, heads = self.step, self.kept.heads
        kept = FLOAT32_BYTES * heads
        if self.kept.square_copies:  # the softmax in float32, and as it is multiplied
            square = FLOAT32_BYTES + step.item_bytes * (self.kept.square_copies - (step.dtype == "float32"))
            return float(kept + square * heads * step.row_tokens)
        kept += step.item_bytes * step.row_tokens if self.is_masked else 0
        if not step.on_gpu and step.dtype == "bfloat16" and step.row_tokens**2 <= MOST_SCORES_KEPT:
            kept += step.item_bytes * heads * step.row_tokens
        return float(kept)


def step_bytes(anatomy: Anatomy, layers: Collection[int], ranks: Mapping[str, int], step: Step) -> float:
    """Peak of what a step holds beside weights, adapters and folded experts, where ``layers`` learn.

    Everything that the layers from the lowest of them up keep, and the largest of three moments: the loss, the
    gradients of the last norm, and those inside a layer. What runs below the boundary holds less at a time than
    backward does.
    """
    works = [LayerWork(anatomy, step, layer, ranks) for layer in range(min(layers), anatomy.layer_count)]
    states = step.item_bytes * anatomy.hidden_size * step.tokens  # what enters the first layer
    final = (FLOAT32_BYTES + step.item_bytes) * anatomy.hidden_size * step.tokens  # the norm before the head
    norm = (NORM_GRADIENTS * FLOAT32_BYTES + 2 * step.item_bytes) * anatomy.hidden_size * step.tokens
    moments = [loss_bytes(anatomy, step), norm, *(work.backward_bytes for work in works)]
    return states + final + sum(work.held_bytes for work in works) + max(moments)


def loss_bytes(anatomy: Anatomy, step: Step) -> float:
    """Logits at labelled positions, whose gradient takes their place, and a few rows of them in float32."""
    rows = step.tokens * step.labelled_share
    copies = anatomy.kept.logit_copies if anatomy.kept else 1
    element = copies * step.item_bytes + (HALF_LOSS_BYTES if step.dtype == "float16" else 0)
    buffer = FLOAT32_BYTES * min(LOSS_ROWS[step.on_gpu], rows) if step.dtype != "float32" else 0
    return anatomy.vocab_size * (rows * element + buffer) + 2 * step.item_bytes * rows * anatomy.hidden_size


def _feed_forward(modules: Sequence[Module]) -> float:
    """Elements for a token of an MLP, of experts or of a router: inputs once each, outputs of all but the last matrix.

    Where there are twice as many of these as the last matrix takes in, half of them is a gate, and its activation is
    multiplied by the other half. Experts get their tokens gathered and scale their results.
    """
    *inner, last = modules
    experts = last.active_experts
    inputs = sum({module.in_features * module.active_experts for module in inner})
    outputs = sum(module.out_features * module.active_experts for module in inner)
    gated = _width_in(last) if outputs >= 2 * _width_in(last) else 0
    results = last.out_features * experts if last.fused else 0
    gathered = last.out_features if last.fused else 0
    return inputs + outputs + gated + _width_in(last) + results + gathered


def _width_in(module: Module) -> int:
    return module.in_features * module.active_experts
