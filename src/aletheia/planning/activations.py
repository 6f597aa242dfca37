"""What a step holds besides weights and adapters, in bytes: activations kept for backward, logits, gradients.

The model counts what autograd saves for a token, layer by layer: inputs and outputs of matrices, what norms and
activations keep, and the queries, keys and values of attention. The counts come from steps on fake tensors.
``benchmarks/memory_estimates.py`` runs them and compares them with measurements on a GPU.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from aletheia.anatomy.schema import Anatomy, Kept, Module

Recompute = Literal["off", "selective", "full"]
FLOAT32_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SQUARE_WORK_BYTES = 8  # per score in backward, where attention keeps its scores: two float32 values
PLAIN_HALF = 2.25  # ratio of gradient bytes: PEFT adding its own products in half precision, to products in one buffer
PLAIN_INPUTS = 3  # extra copies of the hidden states: on a CPU, PEFT rounds a shared input once per matrix
NORM_GRADIENTS = 4  # hidden states in float32 that the backward pass of a norm holds
MOST_SCORES_KEPT = 2**16  # per head, in attention on a CPU: aletheia.execution.cpu.attention.MOST_KEPT
# logits in float32 at once, where Triton computes no loss: BUFFER_ON_DEVICE and ROWS_ON_CPU of aletheia.execution.loss
LOSS_BUFFER_BYTES, LOSS_ROWS = 2**29, 32
HALF_LOSS_BYTES = 12  # per float16 logit: the logit, its logarithm and its gradient in float32
SCANNED = 2  # multiple of the inputs and outputs of a layer without attention: its states are not counted one by one
STATE_GRADIENTS = 3  # copies of a state space's largest tensor that backward holds at once
SLACK = 1.05  # allows for small tensors that are not counted, and for what an allocator rounds up


@dataclass(frozen=True)
class Step:
    """The largest training step of a run, and how it is computed.

    Attributes:
        tokens: tokens in the batch, padding included.
        row_tokens: tokens in its longest row; a batch of several rows is assumed to need padding.
        labelled_share: the largest share of the tokens that carries a label.
        dtype: dtype of the activations: that of the model, or the one its quantized weights are multiplied in.
        recompute: what backward computes again.
        on_gpu: whether the step runs on a GPU.
        resident: whether the weights below the boundary are in memory. They are, unless the model is streamed. A
            prefix that is freed once it is cached counts as resident. None: not known yet.
        keeps: whether its memory stays in use while held-out rows are evaluated, as that of CUDA graphs does.
        held_out: the largest held-out batch, which runs forward only. None: not known.
    """

    tokens: int
    row_tokens: int
    labelled_share: float = 1.0
    dtype: str = "bfloat16"
    recompute: Recompute = "off"
    on_gpu: bool = False
    resident: bool | None = None
    keeps: bool = False
    held_out: "Step | None" = None

    @property
    def item_bytes(self) -> int:
        """Bytes of one element of an activation."""
        return ITEM_BYTES.get(self.dtype, FLOAT32_BYTES)

    @property
    def is_padded(self) -> bool:
        """Whether the batch holds several rows, which may differ in length."""
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
        """What the model's norms and activations keep; without a probe's count, an upper bound like Gemma's."""
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
        """Whether attention gets a mask, for padding or a window; keys and values are then repeated."""
        return self.step.is_padded or 0 < self.kept.window < self.step.row_tokens

    @property
    def has_attention(self) -> bool:
        """Whether one of its matrices belongs to attention."""
        return any(module.role == "attention" for module in self.modules)

    @property
    def everything_bytes(self) -> float:
        """Bytes it keeps where backward computes nothing again."""
        by_role: dict[str, list[Module]] = {}
        for module in self.modules:
            by_role.setdefault(module.role, []).append(module)
        own = self.kept.norms[self.layer] + self._reduced
        wide = self.kept.wide_norms[self.layer]
        if self.kept.states:
            own += self._stretched * self.kept.states[self.layer]
            wide += self._stretched * self.kept.wide_states[self.layer]
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
        """Bytes it keeps where only matrix products and attention are kept; twice where PEFT adds its own products."""
        copies = 2 if self.kept.plain_products else 1
        outputs = copies * sum(module.out_features * module.active_experts for module in self.modules)
        own = outputs + self.anatomy.hidden_size + self._reduced
        own += self.anatomy.attention_width if self.has_attention else 0
        return SLACK * self.step.tokens * (self.step.item_bytes * own + FLOAT32_BYTES * self.kept.heads)

    @property
    def input_bytes(self) -> float:
        """Bytes of its input: all it keeps where backward computes the whole layer again."""
        return SLACK * self.step.tokens * self.step.item_bytes * self.anatomy.hidden_size

    @property
    def backward_bytes(self) -> float:
        """Bytes of the activation gradients in its widest part, and of what recomputation holds at the same time."""
        widest = max(map(_width_in, self.modules), default=0)
        gradients = self.step.item_bytes * (2.0 * widest + self.anatomy.hidden_size)
        if self.kept.plain_products and self.step.dtype != "float32":
            gradients *= PLAIN_HALF
        if self.kept.square_copies and self.has_attention:
            gradients += SQUARE_WORK_BYTES * self.kept.heads * self.step.row_tokens
        gradients += self._stretched * STATE_GRADIENTS * FLOAT32_BYTES * self.kept.largest_state
        again = {"off": 0.0, "selective": self.everything_bytes - self.products_bytes, "full": self.everything_bytes}
        return self.step.tokens * gradients + max(0.0, again[self.step.recompute])

    @property
    def held_bytes(self) -> float:
        """Bytes it keeps from forward to backward."""
        if self.step.recompute == "full":
            return self.input_bytes
        return self.products_bytes if self.step.recompute == "selective" else self.everything_bytes

    @property
    def _stretched(self) -> float:
        """Length of a row in state spaces, which pad it to whole chunks, per length of the row."""
        row, chunk = self.step.row_tokens, self.kept.chunk
        return math.ceil(row / chunk) * chunk / row if chunk else 1.0

    @property
    def _reduced(self) -> float:
        """Elements of the low-rank products of a token."""
        return float(sum(self.ranks.get(module.name, 0) * module.active_experts for module in self.modules))

    def _attention(self, modules: Sequence[Module]) -> float:
        """Elements per token: inputs of the projections, queries, keys and values, and the last projection's input.

        A shared input counts once. With padding, keys and values are repeated to the width of the queries. Latent
        attention builds its queries, keys and values from several parts.
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
        """Bytes per token: row sums of the scores in float32, the additive mask of padded rows, and scores kept."""
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
    """Peak bytes that a run holds besides weights, adapters and folded experts, where ``layers`` learn."""
    training = training_step_bytes(anatomy, layers, ranks, step)
    if step.held_out is None:
        return training
    evaluation = evaluation_bytes(anatomy, ranks, step.held_out)
    return training + evaluation if step.keeps else max(training, evaluation)


def training_step_bytes(anatomy: Anatomy, layers: Collection[int], ranks: Mapping[str, int], step: Step) -> float:
    """Peak bytes of a training step.

    The sum of all that the layers from the lowest of ``layers`` up keep, plus the largest of three peaks: the loss,
    the gradients of the last norm, and those inside a layer. Layers below the boundary never hold more than backward.
    """
    works = [LayerWork(anatomy, step, layer, ranks) for layer in range(min(layers), anatomy.layer_count)]
    states = step.item_bytes * anatomy.hidden_size * step.tokens  # what enters the first layer
    final = (FLOAT32_BYTES + step.item_bytes) * anatomy.hidden_size * step.tokens  # the norm before the head
    norm = (NORM_GRADIENTS * FLOAT32_BYTES + 2 * step.item_bytes) * anatomy.hidden_size * step.tokens
    moments = [loss_bytes(anatomy, step), norm, *(work.backward_bytes for work in works)]
    return states + final + sum(work.held_bytes for work in works) + max(moments)


def evaluation_bytes(anatomy: Anatomy, ranks: Mapping[str, int], held_out: Step) -> float:
    """Peak bytes of a forward pass alone: one layer at a time, or the loss. All layers run, frozen ones, too.

    Inside a layer, what it would keep for backward is an upper bound, together with its input and a stored copy of it.
    """
    works = [LayerWork(anatomy, held_out, layer, ranks) for layer in range(anatomy.layer_count)]
    states = 2 * held_out.item_bytes * anatomy.hidden_size * held_out.tokens
    final = (2 * FLOAT32_BYTES + held_out.item_bytes) * anatomy.hidden_size * held_out.tokens
    loss = loss_bytes(anatomy, held_out, overwrites=False)
    return states + final + max(loss, *(work.everything_bytes for work in works))


def loss_bytes(anatomy: Anatomy, step: Step, overwrites: bool = True) -> float:
    """Bytes of the logits at labelled positions, and of a few rows in float32, which float32 logits do not need.

    The gradient ``overwrites`` the logits; without one, float32 logits need those rows, too.
    """
    rows = step.tokens * step.labelled_share
    copies = anatomy.kept.logit_copies if anatomy.kept else 1
    element = copies * step.item_bytes + (HALF_LOSS_BYTES if step.dtype == "float16" else 0)
    row = FLOAT32_BYTES * anatomy.vocab_size
    in_place = overwrites and step.dtype == "float32"
    buffer = 0 if in_place else min(rows * row, LOSS_BUFFER_BYTES if step.on_gpu else LOSS_ROWS * row)
    return anatomy.vocab_size * rows * element + buffer + 2 * step.item_bytes * rows * anatomy.hidden_size


def _feed_forward(modules: Sequence[Module]) -> float:
    """Elements that an MLP, experts or a router keep for a token: their inputs, and outputs of all but the last matrix.

    A shared input counts once. Where the outputs are twice as wide as the last matrix's input, half of them are a gate
    whose activation multiplies the other half. Experts also keep their gathered tokens and their scaled results.
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
