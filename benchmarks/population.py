"""Many LoRA runs side by side over one frozen model, on a GPU: the whole grid that the defaults are chosen from.

    .venv/bin/python benchmarks/population.py INPUTS.pt --prepare
    .venv/bin/python benchmarks/population.py INPUTS.pt --out OUT --jobs 'main:012,more:0 single:01/40' --seconds 480

``--prepare`` writes down tokens, order of rows and default rates, as ``aletheia train`` takes them, and needs the data.
Runs share the matrix products of the frozen weights; each has its own adapters, rate and layers. They have PEFT's
random start, the batches, the optimizer and the schedule of ``frontier.py`` and ``single_layers.py``, whose lines they
write: OUT/runs.jsonl and OUT/gains.jsonl. Arms that freeze or thaw continue from the state of the run that they branch from.
Every line is on disk when its runs are done; existing runs are not repeated.

``+ratioN`` behind an arm's name is a rate N times as high for B as for A, ``+warmS`` a warm-up over a share S of the
steps, ``+betaB`` another second beta for Adam, ``+mean`` gives layers that freeze the average of their weights.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

RANK, SCALE, WARMUP, EPOCHS = 16, 2.0, 0.05, 3
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = {"in": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}  # by the input they share
# batch size, points at which held-out losses are taken, held-out rows, averages of the weights
LENGTHS = {"40": (4, 2, 160, (3, 8)), "150": (4, 5, 160, (3, 8)), "epochs": (8, 12, 96, (3,))}
SCALES = (0.6, 0.8)  # of the adapters: at the end, or, over several passes, of the averages at every point
SINGLE_RATE, SINGLE_ROWS = 4e-3, 96
TASKS = ("gsm8k", "strategyqa", "mix")
FORKS = (0.25, 0.35, 0.5, 0.7)  # shares of a run after which arms part from uniform LoRA
Rows = Sequence[tuple[list[int], list[int]]]  # tokens and labels


class Frozen:
    """The weights of a Llama-like model, laid out for many runs at once. Shapes: K runs, N tokens, D width."""

    def __init__(self, model: nn.Module, device: str, compiled: bool) -> None:
        config, inner = model.config, model.model
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.eps, self.theta, self.width = config.rms_norm_eps, config.rope_parameters["rope_theta"], config.hidden_size

        def put(*weights: torch.Tensor) -> torch.Tensor:
            return torch.cat([weight.detach() for weight in weights]).to(device, torch.bfloat16)

        self.embedding, self.norm = put(inner.embed_tokens.weight), put(inner.norm.weight)
        self.head = put(model.lm_head.weight)
        self.layers = []
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                {
                    "in": put(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
                    "o": put(attention.o_proj.weight),
                    "gate_up": put(mlp.gate_proj.weight, mlp.up_proj.weight),
                    "down": put(mlp.down_proj.weight),
                    "norm": put(layer.input_layernorm.weight),
                    "norm_mlp": put(layer.post_attention_layernorm.weight),
                }
            )
        self.shapes = {
            name: tuple(module.weight.shape)
            for name, module in zip(
                SEVEN,
                (
                    *(getattr(inner.layers[0].self_attn, f"{name}_proj") for name in SEVEN[:4]),
                    *(getattr(inner.layers[0].mlp, f"{name}_proj") for name in SEVEN[4:]),
                ),
                strict=True,
            )
        }
        self.pointwise: dict[str, Callable] = {"rotate": rotated, "swiglu": swiglu}
        if compiled:
            self.pointwise = {name: torch.compile(own, dynamic=True) for name, own in self.pointwise.items()}

    @cached_property
    def places(self) -> list[tuple[int, str, str, int, tuple[int, int]]]:
        """(layer, matrix, A or B, offset, shape) of each factor in a run's flat parameters, layer by layer."""
        found, at = [], 0
        for layer in range(len(self.layers)):
            for name in SEVEN:
                outputs, inputs = self.shapes[name]
                for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                    found.append((layer, name, factor, at, shape))
                    at += shape[0] * shape[1]
        return found

    @property
    def size(self) -> int:
        """Parameters of a run."""
        *_, at, shape = self.places[-1]
        return at + shape[0] * shape[1]

    @property
    def per_layer(self) -> int:
        """Parameters of a layer."""
        return self.size // len(self.layers)

    def start(self, seed: int, single: int | None = None) -> torch.Tensor:
        """Flat parameters as PEFT draws them: every layer, or one layer alone as if there were no other."""
        flat = torch.zeros(self.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer, name, factor, at, shape in self.places:
                if factor == "B" or single not in (None, layer):
                    continue
                outputs, inputs = self.shapes[name]
                first = nn.Linear(inputs, RANK, bias=False)
                nn.Linear(RANK, outputs, bias=False)
                nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
                flat[at : at + shape[0] * shape[1]] = first.weight.detach().flatten()
        return flat.to(torch.bfloat16).float()  # PEFT rounds to the model's dtype, then learns in float32

    def factors(self, flat_KP: torch.Tensor, boundary: int, leaves: bool) -> tuple[list[dict], list[torch.Tensor]]:
        """Adapters of each layer in bfloat16; and, from the boundary up, leaves of a graph, [K, layers, ...] each."""
        low = flat_KP.to(torch.bfloat16).view(len(flat_KP), len(self.layers), self.per_layer)
        upper, learned = self.joined(low[:, boundary:], leaves)
        return [*self.joined(low[:, :boundary], False)[0], *upper], learned

    def joined(self, low: torch.Tensor, leaves: bool) -> tuple[list[dict], list[torch.Tensor]]:
        """Adapters of consecutive layers; those of matrices that share an input as one, B in blocks."""
        parts, learned = {}, []
        for _, name, factor, at, shape in self.places[: 2 * len(SEVEN)]:
            own = low[:, :, at : at + shape[0] * shape[1]].unflatten(2, shape)
            if leaves:
                own = own.detach().requires_grad_(True)
                learned.append(own)
            parts[name, factor] = own
        layers: list[dict] = [{} for _ in range(low.shape[1])]
        for group, names in GROUPS.items():
            rows = []
            for at, name in enumerate(names):
                own = parts[name, "B"]
                rows.append(F.pad(own, (at * RANK, (len(names) - 1 - at) * RANK)))
            a, b = torch.cat([parts[name, "A"] for name in names], 2), torch.cat(rows, 2)
            for layer, pair in zip(layers, zip(a.unbind(1), b.unbind(1), strict=True), strict=True):
                layer[group] = pair
        return layers, learned

    def losses(self, layers: list[dict], batch: "Batch", boundary: int = 0, per_row: bool = False) -> torch.Tensor:
        """Mean loss of each run [K], or summed loss of each row [K, rows]; no gradient below the boundary."""
        runs = layers[0]["o"][0].shape[0]
        cos, sin = batch.rotations(self.theta, self.head_dim)
        x = F.embedding(batch.ids, self.embedding).flatten(1, 2).expand(runs, -1, -1)
        with torch.no_grad():
            for weights, own in zip(self.layers[:boundary], layers[:boundary], strict=True):
                x = self.block(x, weights, own, batch, cos, sin)
        for weights, own in zip(self.layers[boundary:], layers[boundary:], strict=True):
            x = self.block(x, weights, own, batch, cos, sin)
        found = []
        for run, own in enumerate(x.unbind()):  # one run's logits at a time
            where, targets, row = batch.labelled[run if len(batch.labelled) > 1 else 0]
            own = F.rms_norm(own[where], (self.width,), self.norm, self.eps)
            losses = F.cross_entropy((own @ self.head.T).float(), targets, reduction="none")
            if per_row:
                rows = torch.zeros(batch.ids.shape[1], device=losses.device, dtype=torch.float64)
                found.append(rows.index_add_(0, row, losses.double()))
            else:
                found.append(losses.mean())
        return torch.stack(found)

    def block(self, x, weights, own, batch: "Batch", cos, sin) -> torch.Tensor:
        """One decoder layer of every run."""
        runs, tokens, width = x.shape
        _, rows, length = batch.ids.shape
        heads, kv = self.heads, self.kv_heads
        h = F.rms_norm(x, (width,), weights["norm"], self.eps)
        h = lora(h, weights["in"], *own["in"])
        h = h.view(runs * rows, length, heads + 2 * kv, self.head_dim).transpose(1, 2)
        qk = self.pointwise["rotate"](h[:, : heads + kv], cos, sin)
        shared = x.device.type == "cuda"
        q, k, v = qk[:, :heads], qk[:, heads:], h[:, heads + kv :]
        if not shared:
            k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        h = h.transpose(1, 2).reshape(runs, tokens, heads * self.head_dim)
        x = x + lora(h, weights["o"], *own["o"])
        h = F.rms_norm(x, (width,), weights["norm_mlp"], self.eps)
        h = self.pointwise["swiglu"](lora(h, weights["gate_up"], *own["gate_up"]))
        return x + lora(h, weights["down"], *own["down"])


def lora(x_KNI: torch.Tensor, weight: torch.Tensor, a_KRI: torch.Tensor, b_KOR: torch.Tensor) -> torch.Tensor:
    """A frozen product and each run's own adapter."""
    return F.linear(x_KNI, weight).baddbmm_(torch.bmm(x_KNI, a_KRI.mT), b_KOR.mT, alpha=SCALE)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Batch:
    """Rows padded on the right: one batch for each run, or one for all. ``ids`` [runs or 1, rows, tokens]."""

    def __init__(self, batches: Sequence[Rows], device: str) -> None:
        longest = max(len(tokens) for rows in batches for tokens, _ in rows)
        ids = torch.zeros(len(batches), len(batches[0]), longest, dtype=torch.long)
        made: dict[int, Any] = {}  # runs of one seed have one batch
        self.labelled = []  # place, target and row of each labelled token, by run
        for run, rows in enumerate(batches):
            where, targets, row = [], [], []
            for at, (tokens, labels) in enumerate(rows):
                ids[run, at, : len(tokens)] = torch.tensor(tokens)
                for place, label in enumerate(labels[1:]):
                    if label != -100:
                        where.append(at * longest + place)
                        targets.append(label)
                        row.append(at)
            if id(rows) not in made:
                made[id(rows)] = tuple(torch.tensor(own).to(device, non_blocking=True) for own in (where, targets, row))
            self.labelled.append(made[id(rows)])
        self.ids = ids.to(device)

    def rotations(self, theta: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [length, size] in bfloat16."""
        device = self.ids.device
        inverse = 1.0 / theta ** (torch.arange(0, size, 2, device=device).float() / size)
        angles = torch.outer(torch.arange(self.ids.shape[2], device=device).float(), inverse).repeat(1, 2)
        return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


@dataclass(frozen=True)
class Arm:
    """One run: what ``frontier.py`` calls an arm, at a rate."""

    name: str
    rate: float
    seed: int
    layers: tuple[int, ...]
    boundaries: tuple[tuple[float, int], ...] = ((0.0, 0),)
    ratio: float = 1.0
    beta: float = 0.999
    warmup: float = WARMUP
    freezes_mean: bool = False
    single: int | None = None

    @classmethod
    def named(cls, name: str, rate: float, seed: int, count: int, paper: tuple[int, ...]) -> "Arm":
        base, *options = name.split("+")
        kind, *numbers = base.split("-")
        every = tuple(range(count))
        match kind, [float(number) for number in numbers]:
            case "uniform", []:
                arm = cls(name, rate, seed, every)
            case "freeze", [share, boundary]:
                arm = cls(name, rate, seed, every, ((0.0, 0), (share, int(boundary))))
            case "thaw", [share, boundary]:
                arm = cls(name, rate, seed, every, ((0.0, int(boundary)), (share, 0)))
            case "last", [boundary]:
                arm = cls(name, rate, seed, every[int(boundary) :], ((0.0, int(boundary)),))
            case "spread", [stride]:
                arm = cls(name, rate, seed, every[:: int(stride)])
            case "between", [first, last]:
                arm = cls(name, rate, seed, every[int(first) : int(last) + 1])
            case "paper", []:
                arm = cls(name, rate, seed, paper)
            case "layer", [layer]:
                arm = cls(name, rate, seed, (int(layer),), single=int(layer))
            case _:
                raise SystemExit(f"unknown arm {name}")
        for option in options:
            value = option.lstrip("abcdefghijklmnopqrstuvwxyz")
            match option.removesuffix(value):
                case "ratio":
                    arm = replace(arm, ratio=float(value))
                case "beta":
                    arm = replace(arm, beta=float(value))
                case "warm":
                    arm = replace(arm, warmup=float(value))
                case "mean":
                    arm = replace(arm, freezes_mean=True)
                case _:
                    raise SystemExit(f"unknown option +{option}")
        return arm

    def starts(self, steps: int) -> list[tuple[int, int]]:
        """(steps done, boundary) of each phase."""
        return [(min(round(share * steps), steps - 1) if share else 0, boundary) for share, boundary in self.boundaries]

    def factor(self, done: int, steps: int) -> float:
        """The rate of the step after ``done``, as a share of the peak."""
        warmup = math.ceil(self.warmup * steps)
        return min(done / warmup, (steps - done) / (steps - warmup))

    @property
    def stem(self) -> tuple:
        """What runs share that part later."""
        return self.seed, self.rate, self.layers, self.ratio, self.beta, self.warmup, self.single


@dataclass
class State:
    """All that changes in K runs: flat parameters, their averages by eta, Adam's moments [K, P]; held-out losses."""

    flat: torch.Tensor
    means: dict[int, torch.Tensor]
    first: torch.Tensor
    second: torch.Tensor
    begun: list[int]  # steps before which a layer had not learned
    points: list[list]  # of each run: step and losses
    averages: list[list]  # step, eta and losses
    scaled: list[list]  # step, eta or 0, scale and losses

    @classmethod
    def stacked(cls, states: Sequence["State"], device: str) -> "State":
        """States of single runs as one."""
        assert all(state.begun == states[0].begun for state in states)

        def joined(parts: Iterable[torch.Tensor]) -> torch.Tensor:
            return torch.cat(list(parts)).to(device)

        return cls(
            joined(state.flat for state in states),
            {eta: joined(state.means[eta] for state in states) for eta in states[0].means},
            joined(state.first for state in states),
            joined(state.second for state in states),
            list(states[0].begun),
            [list(points) for state in states for points in state.points],
            [list(points) for state in states for points in state.averages],
            [list(points) for state in states for points in state.scaled],
        )

    def of(self, run: int) -> "State":
        """A copy of one run's, in the machine's memory."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[run : run + 1].to("cpu", copy=True)

        means = {eta: own(mean) for eta, mean in self.means.items()}
        notes = [[list(of_runs[run])] for of_runs in (self.points, self.averages, self.scaled)]
        return State(own(self.flat), means, own(self.first), own(self.second), list(self.begun), *notes)


class Cell:
    """The runs of a task and a length."""

    def __init__(self, frozen: Frozen, inputs: dict, task: str, length: str, device: str) -> None:
        self.frozen, self.task, self.length, self.device = frozen, task, length, device
        own = inputs["tasks"][task]
        batch_size, points, held_out, self.etas = LENGTHS[length]
        self.batch_size, self.paper, self.rate = batch_size, tuple(own["paper"]), own["rates"][length]
        self.rows, self.held_out = own["train"], own["held_out"][:held_out]
        self.orders = {seed: batches for (name, seed), batches in own["orders"].items() if name == length}
        self.steps = len(self.orders[0])
        self.due = {round(self.steps * number / points) for number in range(1, points + 1)}
        self.known: dict[Any, State] = {}

    @cached_property
    def counts(self) -> list[int]:
        """Labelled tokens of each held-out row."""
        return [sum(label != -100 for label in labels[1:]) for _, labels in self.held_out]

    @cached_property
    def held_out_batches(self) -> list[tuple[list[int], Batch]]:
        """Held-out rows by length."""
        order = sorted(range(len(self.held_out)), key=lambda row: -len(self.held_out[row][0]))
        cut = [order[at : at + 16] for at in range(0, len(order), 16)]
        return [(rows, Batch([[self.held_out[row] for row in rows]], self.device)) for rows in cut]

    def run(self, arms: Sequence[Arm], most: Callable[[int], int]) -> dict[Arm, dict]:
        """Train arms, those that begin alike together; points and averages by arm."""
        done: dict[Arm, State] = {}
        wanted: dict[tuple, set[int]] = {}  # steps at which the states of a beginning are kept for others
        alone, later = [], []
        for arm in arms:
            (_, boundary), *rest = arm.starts(self.steps)
            wanted.setdefault((arm.stem, boundary), set())
            if rest:
                later.append(arm)
                wanted[arm.stem, boundary].add(rest[0][0])
            else:
                alone.append(arm)
                if arm.name == "uniform":
                    wanted[arm.stem, boundary] |= {round(share * self.steps) for share in FORKS}
        waves: dict[tuple[int, int], list[Arm]] = {}  # by boundary and last step
        for arm in alone:
            waves.setdefault((arm.starts(self.steps)[0][1], self.steps), []).append(arm)
        begun = {(arm.stem, arm.starts(self.steps)[0][1]) for arm in alone}
        for arm in later:  # beginnings that no arm of one phase has
            key = (arm.stem, arm.starts(self.steps)[0][1])
            missing = {at for at in wanted[key] if (*key, at) not in self.known}
            if key not in begun and missing:
                begun.add(key)
                waves.setdefault((key[1], max(missing)), []).append(replace(arm, boundaries=arm.boundaries[:1]))
        for (boundary, last), wave in waves.items():
            for part in cut(wave, most(self.longest)):
                state = self.fresh(part, boundary)
                self.train(state, part, boundary, 0, last, [wanted[arm.stem, boundary] for arm in part])
                if last == self.steps:
                    done |= {arm: state.of(run) for run, arm in enumerate(part)}
        turns: dict[tuple[int, int, int], list[Arm]] = {}
        for arm in later:
            (_, before), (at, boundary) = arm.starts(self.steps)
            turns.setdefault((at, before, boundary), []).append(arm)
        for (at, before, boundary), wave in turns.items():
            for part in cut(wave, most(self.longest)):
                state = State.stacked([self.known[arm.stem, before, at] for arm in part], self.device)
                self.turn(state, part, before, boundary, at)
                self.train(state, part, boundary, at, self.steps, [set() for _ in part])
                done |= {arm: state.of(run) for run, arm in enumerate(part)}
        return {
            arm: {"points": s.points[0], "decays": [], "averages": s.averages[0], "scaled": s.scaled[0]}
            for arm, s in done.items()
        }

    @property
    def longest(self) -> int:
        """Tokens of the largest batch."""
        return max(
            len(rows) * max(len(self.rows[row][0]) for row in rows) for order in self.orders.values() for rows in order
        )

    def fresh(self, arms: Sequence[Arm], boundary: int) -> State:
        """Runs at their start."""
        kinds = {(arm.seed, arm.single) for arm in arms}
        starts = {kind: self.frozen.start(*kind) for kind in kinds}
        flat = torch.stack([starts[arm.seed, arm.single] for arm in arms]).to(self.device)
        layers = len(self.frozen.layers)
        begun = [0 if layer >= boundary else self.steps for layer in range(layers)]
        means = {eta: flat.clone() for eta in self.etas}
        notes: list[list[list]] = [[[] for _ in arms] for _ in range(3)]
        return State(flat, means, torch.zeros_like(flat), torch.zeros_like(flat), begun, *notes)

    def turn(self, state: State, arms: Sequence[Arm], before: int, boundary: int, at: int) -> None:
        """Begin a phase: layers that freeze have one value from here on, layers that thaw begin to learn."""
        end = boundary * self.frozen.per_layer
        for eta, mean in state.means.items():
            for run, arm in enumerate(arms):
                if arm.freezes_mean and eta == self.etas[0]:
                    state.flat[run, :end] = mean[run, :end]
        for mean in state.means.values():
            mean[:, :end] = state.flat[:, :end]
        for layer in range(boundary, before):
            state.begun[layer] = at

    def train(
        self, state: State, arms: Sequence[Arm], boundary: int, first: int, last: int, wanted: Sequence[set[int]]
    ) -> None:
        """Steps ``first + 1`` to ``last``; states of runs that others go on from are kept."""
        begin = boundary * self.frozen.per_layer
        mask = self.masks(arms, begin)
        ratio = self.ratios(arms, begin)
        betas = torch.tensor([[arm.beta] for arm in arms], device=self.device)
        segments = self.segments(state, boundary)
        seeds = {arm.seed for arm in arms}
        for number in range(first + 1, last + 1):
            rows = {seed: [self.rows[row] for row in self.orders[seed][number - 1]] for seed in seeds}
            batch = Batch([rows[arm.seed] for arm in arms] if len(seeds) > 1 else [rows[arms[0].seed]], self.device)
            layers, leaves = self.frozen.factors(state.flat, boundary, leaves=True)
            grads = torch.autograd.grad(self.frozen.losses(layers, batch, boundary).sum(), leaves)
            del layers, leaves
            grad = torch.cat([own.flatten(2) for own in grads], 2).flatten(1).float()  # [K, P above the boundary]
            del grads
            if mask is not None:
                grad *= mask
            grad *= (1.0 / (grad.square().sum(1, keepdim=True).sqrt() + 1e-6)).clamp(max=1.0)
            rates = torch.tensor([[arm.rate * arm.factor(number - 1, self.steps)] for arm in arms], device=self.device)
            low, high = state.first[:, begin:], state.second[:, begin:]
            low.lerp_(grad, 0.1)
            high.mul_(betas).addcmul_(grad, grad * (1 - betas))
            for own, begun in segments:
                count = number - begun
                step = low[:, own] / ((high[:, own] / (1 - betas**count)).sqrt_().add_(1e-8))
                step *= rates / (1 - 0.9**count)
                if ratio is not None:
                    step *= ratio[:, own]
                state.flat[:, begin:][:, own] -= step
            for eta, mean in state.means.items():
                mean[:, begin:].lerp_(state.flat[:, begin:], min(1.0, (eta + 1) / (number + eta)))
            if number in self.due:
                self.note(state, number)
            for run, arm in enumerate(arms):
                if number in wanted[run]:
                    self.known[arm.stem, boundary, number] = state.of(run)

    def masks(self, arms: Sequence[Arm], begin: int) -> torch.Tensor | None:
        """1 where a run has adapters [K, P above the boundary]; None where all have them all."""
        count = len(self.frozen.layers)
        if all(len(arm.layers) == count for arm in arms):
            return None
        own = torch.zeros(len(arms), count, device=self.device)
        for run, arm in enumerate(arms):
            own[run, list(arm.layers)] = 1
        return own.repeat_interleave(self.frozen.per_layer, 1)[:, begin:]

    def ratios(self, arms: Sequence[Arm], begin: int) -> torch.Tensor | None:
        """The rate of each parameter as a multiple of its run's; None where it is 1 for all."""
        if all(arm.ratio == 1.0 for arm in arms):
            return None
        own = torch.ones(len(arms), self.frozen.size, device=self.device)
        ratios = torch.tensor([[arm.ratio] for arm in arms], device=self.device)
        for _, _, factor, at, shape in self.frozen.places:
            if factor == "B":
                own[:, at : at + shape[0] * shape[1]] = ratios
        return own[:, begin:]

    def segments(self, state: State, boundary: int) -> list[tuple[slice, int]]:
        """Parameters above the boundary whose layers began to learn at the same step, and that step."""
        found: list[tuple[slice, int]] = []
        size = self.frozen.per_layer
        for layer in range(boundary, len(self.frozen.layers)):
            place = slice((layer - boundary) * size, (layer - boundary + 1) * size)
            if found and found[-1][1] == state.begun[layer]:
                place = slice(found.pop()[0].start, place.stop)
            found.append((place, state.begun[layer]))
        return found

    @torch.no_grad()
    def note(self, state: State, number: int) -> None:
        """Held-out losses of the weights and of their averages."""
        for run, nats in enumerate(self.nats(state.flat)):
            state.points[run].append([number, nats])
        for eta, mean in state.means.items():
            for run, nats in enumerate(self.nats(mean)):
                state.averages[run].append([number, eta, nats])
        repeats = self.length == "epochs"
        eta = self.etas[0] if repeats else 0
        values = state.means[eta] if repeats else state.flat
        for scale in SCALES if self.etas and (repeats or number == self.steps) else ():
            for run, nats in enumerate(self.nats(values * self.scales(scale))):
                state.scaled[run].append([number, eta, scale, nats])

    def scales(self, scale: float) -> torch.Tensor:
        """What makes an adapter's product so many times as large: a factor for each parameter of a run."""
        found = torch.ones(self.frozen.size, device=self.device)
        for _, _, factor, at, shape in self.frozen.places:
            if factor == "B":
                found[at : at + shape[0] * shape[1]] = scale
        return found

    @torch.no_grad()
    def nats(self, flat: torch.Tensor) -> list[list[float]]:
        """Summed loss of each held-out row, run by run."""
        layers, _ = self.frozen.factors(flat, 0, leaves=False)
        found = torch.zeros(len(flat), len(self.held_out), dtype=torch.float64, device=self.device)
        for rows, batch in self.held_out_batches:
            found[:, rows] = self.frozen.losses(layers, batch, per_row=True)
        return [[round(value, 1) for value in own] for own in found.tolist()]


def cut(arms: Sequence[Arm], most: int) -> list[Sequence[Arm]]:
    """Parts of at most a given size."""
    return [arms[at : at + most] for at in range(0, len(arms), most)]


def main_arms(rate: float) -> list[tuple[str, float]]:
    """The default, its baseline at three rates, and the arms it was chosen from."""
    arms = [("uniform", rate / 2), ("uniform", rate), ("uniform", 2 * rate)]
    return [*arms, ("freeze-0.5-15", rate), ("freeze-0.25-15", rate), ("freeze-0.5-15", 2 * rate)]


def more_arms(rate: float) -> list[tuple[str, float]]:
    """Other boundaries, layers and optimizers."""
    at_rate = ("freeze-0.5-15+mean", "freeze-0.35-15", "freeze-0.7-15", "freeze-0.5-8", "freeze-0.5-21")
    twice = ("paper", "spread-2", "between-8-22", "thaw-0.5-15")
    arms = [(name, rate) for name in (*at_rate, *twice)] + [(name, 2 * rate) for name in twice]
    arms += [("uniform+ratio4", rate / 2), ("uniform+ratio2", rate), ("uniform+beta0.95", rate)]
    return [*arms, ("uniform+warm0.2", 2 * rate), ("freeze-0.5-15", rate / 2)]


def prepare(path: Path, data: Path, seeds: Sequence[int]) -> None:
    """Write tokens, orders, default rates and the paper's layers of each task."""
    from tasks import task

    import aletheia
    from aletheia.anatomy.demo import demo_checkpoint
    from aletheia.data.order import training_batches
    from aletheia.training.learning_rate import default_learning_rate

    base = aletheia.load(str(demo_checkpoint()))
    found: dict[str, Any] = {}
    for name in TASKS:
        own = task(name, base.tokenizer, 192, data)
        lengths = [len(row) for row in own.train.examples]
        scores = aletheia.probe(base.model, own.train, seed=0)
        orders, rates = {}, {}
        for length, (batch_size, *_) in LENGTHS.items():
            steps = EPOCHS * math.ceil(len(lengths) / batch_size) if length == "epochs" else int(length)
            rate = default_learning_rate(
                base.model.config.hidden_size,
                steps,
                EPOCHS if length == "epochs" else steps * batch_size / len(lengths),
            )
            rates[length] = float(f"{rate:.3g}")
            for seed in seeds:
                orders[length, seed] = training_batches(lengths, batch_size, steps, seed)
        found[name] = {
            **{"train": plain(own.train.examples), "held_out": plain(own.held_out.examples), "orders": orders},
            **{"rates": rates, "paper": list(aletheia.plan(scores, policy="top-percent").layers)},
        }
        print(name, len(lengths), "rows,", rates, flush=True)
    torch.save({"tasks": found}, path)


def plain(rows: Sequence[Any]) -> Rows:
    """Tokens and labels."""
    return [(list(row.input_ids), list(row.labels)) for row in rows]


JOBS = """one after the other, each with its seeds and lengths: 'main:012,more:0/40,150 single:01/40'; main, more,
single, or an arm with @ and a multiple of the rate. What is joined by commas is trained side by side"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", default="main:012", help=JOBS)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, help="break runs off here, to try the script")
    parser.add_argument("--compile", action="store_true", help="element-wise parts, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.prepare:
        prepare(args.inputs, args.data, range(5))
        return
    import aletheia
    from aletheia.anatomy.demo import demo_checkpoint

    inputs = torch.load(args.inputs, weights_only=False)
    frozen = Frozen(aletheia.load(args.model or str(demo_checkpoint()), device="cpu").model, args.device, args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    there = known_lines(args.out)
    for part in args.jobs.split():
        jobs, _, lengths = part.partition("/")
        for length in lengths.split(",") if lengths else LENGTHS:
            for task in args.tasks.split(","):
                if time.perf_counter() - started > args.seconds:
                    print(f"out of time before {jobs} {task} {length}", flush=True)
                    return
                cell = Cell(frozen, inputs, task, length, args.device)
                if args.steps:
                    cell.steps, cell.due = args.steps, {args.steps}
                arms = [
                    Arm.named(arm, float(f"{rate:.3g}"), seed, len(frozen.layers), cell.paper)
                    for job in jobs.split(",")
                    for seed in seeds_of(job)
                    for arm, rate in arms_of(job.partition(":")[0], cell.rate, len(frozen.layers))
                ]
                arms = [arm for arm in arms if (task, length, arm.seed, arm.name, arm.rate) not in there]
                if arms:
                    one_job(cell, arms, jobs.startswith("single"), args.out, device)


def seeds_of(job: str) -> list[int]:
    """``main:012`` has the seeds 0, 1 and 2."""
    return [int(digit) for digit in job.partition(":")[2] or "0"]


def arms_of(job: str, rate: float, layers: int) -> list[tuple[str, float]]:
    """Arms and rates of a job."""
    if job == "single":
        return [(f"layer-{layer}", SINGLE_RATE) for layer in range(layers)]
    if job in ("main", "more"):
        return main_arms(rate) if job == "main" else more_arms(rate)
    arm, _, times = job.partition("@")
    return [(arm, rate * float(times or 1))]


def one_job(cell: Cell, arms: list[Arm], is_single: bool, out: Path, device: str) -> None:
    """Train arms of a cell, write their lines, print where they ended."""
    begun = time.perf_counter()
    if is_single:
        cell.due = {cell.steps}
        cell.held_out, cell.etas = cell.held_out[:SINGLE_ROWS], ()
    found = cell.run(arms, runs_at_once)
    seconds = time.perf_counter() - begun
    lines = []
    for arm, own in found.items():
        about = {"task": cell.task, "steps": cell.steps, "seed": arm.seed, "counts": cell.counts}
        if is_single:
            own = {"layer": arm.single, "nats": own["points"][-1][1], "seconds": round(seconds / len(arms), 2)}
        else:
            about |= {"length": cell.length, "batch_size": cell.batch_size, "rate": arm.rate, "arm": arm.name}
            own = own | {"seconds": round(seconds / len(arms), 2)}
        lines.append(about | own | {"device": device})
    if is_single:
        nothing = cell.frozen.start(0)[None].to(cell.device)  # an adapter at its start adds nothing
        about = {"task": cell.task, "steps": cell.steps, "seed": None, "counts": cell.counts, "layer": None}
        lines.append(about | {"nats": cell.nats(nothing)[0], "device": device})
    with (out / ("gains.jsonl" if is_single else "runs.jsonl")).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

    def mean(nats: list[float]) -> float:
        return sum(nats) / sum(cell.counts)

    def best(own: dict) -> str:
        averages = [mean(nats) for _, eta, nats in own["averages"] if eta == cell.etas[0]]
        low, step = min((mean(nats), step) for step, nats in own["points"])
        return f"{low:.4f}@{step}" + (f" mean {min(averages):.4f}" if averages else "")

    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if cell.device == "cuda" else ""
    losses = ", ".join(
        f"{arm.name} {arm.rate:g}: {best(own)}" for arm, own in found.items() if arm.seed == arms[0].seed
    )
    print(f"{cell.task} {cell.length}: {len(found)} runs, {seconds:.1f} s{memory} | {losses}", flush=True)


def runs_at_once(tokens: int) -> int:
    """How many runs fit into the GPU's memory."""
    if not torch.cuda.is_available():
        return 8
    free = torch.cuda.get_device_properties(0).total_memory * 0.8
    return max(1, int(free / (tokens * 900e3 + 400e6)))


def known_lines(out: Path) -> set[tuple]:
    """Existing runs."""
    found: set[tuple] = set()
    for name in ("runs.jsonl", "gains.jsonl"):
        for line in (out / name).read_text().splitlines() if (out / name).exists() else ():
            run = json.loads(line)
            if name == "runs.jsonl":
                found.add((run["task"], run["length"], run["seed"], run["arm"], run["rate"]))
            else:
                found.add((run["task"], "40", run["seed"], f"layer-{run['layer']}", SINGLE_RATE))
    return found


if __name__ == "__main__":
    main()
