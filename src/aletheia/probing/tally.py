"""Collect what backward passes measured into scores, for the resident and the streamed probe."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aletheia.anatomy.read import is_matrix, layer_index, stacks_of
from aletheia.anatomy.schema import Anatomy, ModelIdentity
from aletheia.data.batches import labelled_tokens, sample_batches
from aletheia.data.examples import Examples
from aletheia.errors import ProbeError
from aletheia.files import package_versions
from aletheia.probing.experts import ExpertRecorder
from aletheia.probing.ghost import GhostRecorder, at_least_float32
from aletheia.probing.scores import ExpertScores, ProbeSettings, Scores, WeightBytes

SCORE = "gradient-norm"
Batch = dict[str, torch.Tensor]
Norms = dict[str, float]  # by full name
Stack = tuple[list[float], list[int] | None]  # of experts: gradient norms, and tokens where the routing was seen


def draw(data: Examples | Iterable[Batch], batches: int, batch_size: int, seed: int) -> list[Batch]:
    """The batches of a probe: drawn from examples, or the given ones.

    Raises:
        ProbeError: there is no batch, a batch has no label, or ``batches`` or ``batch_size`` is below 1.
    """
    if isinstance(data, Examples):
        if batches < 1 or batch_size < 1:
            raise ProbeError(f"`batches` is {batches} and `batch_size` {batch_size}; expected at least 1 each")
        used = sample_batches(data, batches, batch_size, seed)
    else:
        used = list(data)
    if not used:
        raise ProbeError("no batch to probe with; expected at least one; add rows or batches")
    for number, batch in enumerate(used, start=1):
        if not labelled_tokens(batch["labels"]):
            raise ProbeError(f"probe batch {number} has no labelled token; expected labels other than -100")
    return used


def probe_settings(
    used: Sequence[Batch],
    losses: Sequence[float],
    seed: int | None,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> ProbeSettings:
    """How scores were measured; ``seed`` is None if the batches were given."""
    return ProbeSettings(
        score=SCORE,
        batches=len(used),
        batch_size=max(batch["input_ids"].shape[0] for batch in used),
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        tokens=sum(int(batch["attention_mask"].sum()) for batch in used),
        labelled_tokens=sum(int(labelled_tokens(batch["labels"])) for batch in used),
        mean_loss=sum(losses) / len(losses),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Measured:
    """Gradient norms of one batch: of matrices and stacks, of all other parameters, and of single experts."""

    modules: Norms
    others: Norms
    experts: dict[str, Stack]

    @property
    def norms(self) -> Norms:
        """The norms of all parameters, by full name."""
        return self.modules | self.others


def other_parameters(module: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """By full name, the parameters inside ``module`` whose gradients no hook measures, such as norms and biases."""
    ghosts = {id(inner.weight) for inner in module.modules() if is_matrix(inner)}
    ghosts |= {id(owner._parameters[name]) for owner, name in stacks_of(module).values()}
    return {
        f"{path}.{name}": parameter
        for name, parameter in module.named_parameters()
        if id(parameter) not in ghosts and parameter.is_floating_point()
    }


def measured(
    recorder: GhostRecorder,
    experts: ExpertRecorder,
    others: Mapping[str, torch.Tensor | None],
    loss_scale: float = 1.0,
) -> Measured:
    """What the hooks measured in a backward pass, and the gradient norms of ``others``, divided by ``loss_scale``."""
    norms = {name: norm.item() / loss_scale for name, norm in recorder.pop().items()}
    stacks: dict[str, Stack] = {}
    for name, (norms_E, tokens_E) in experts.pop().items():
        norms[name] = norms_E.norm().item() / loss_scale
        stacks[name] = ((norms_E / loss_scale).tolist(), None if tokens_E is None else tokens_E.tolist())
    other_norms = {
        name: torch.linalg.vector_norm(at_least_float32(gradient)).item() / loss_scale
        for name, gradient in others.items()
        if gradient is not None
    }
    return Measured(norms, other_norms, stacks)


class Tally:
    """Sums over batches, and for layers also over parameters."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Start with nothing measured."""
        self._anatomy = anatomy
        self.layers = [0.0] * anatomy.layer_count
        self.modules: dict[str, float | None] = {
            module.name: None if module.role == "expert" else 0.0 for module in anatomy.modules
        }
        self._stacks: dict[str, list[Stack]] = {}

    def add(self, found: Measured) -> None:
        """Add the measurements of a batch, or of a part of it."""
        for name, norm in found.modules.items():
            self.modules[name] = (self.modules[name] or 0.0) + norm
        for name, norm in found.norms.items():
            self.layers[layer_index(name, self._anatomy.layer_path)] += norm
        for name, stack in found.experts.items():
            self._stacks.setdefault(name, []).append(stack)

    def scores(
        self, model: ModelIdentity, data: Examples | None, settings: ProbeSettings, weights: WeightBytes
    ) -> Scores:
        """The sums as Scores; ``data`` is None if the batches were given."""
        return Scores(
            model=model,
            data=data.identity if data else None,
            tokenizer=data.tokenizer if data else None,
            probe=settings,
            packages=package_versions(),
            layers=tuple(self.layers),
            modules=self.modules,
            experts={name: _expert_scores(stacks) for name, stacks in self._stacks.items()},
            anatomy=self._anatomy,
            weight_bytes=weights,
        )


def _expert_scores(stacks: Sequence[Stack]) -> ExpertScores:
    """Sums over the batches; None for an expert without a token, or, if tokens are unknown, without a gradient."""
    norms = [sum(of_expert) for of_expert in zip(*(norms for norms, _ in stacks), strict=True)]
    counted = [tokens for _, tokens in stacks if tokens is not None]
    tokens = tuple(map(sum, zip(*counted, strict=True))) if len(counted) == len(stacks) else None
    reached = tokens or norms
    return ExpertScores(
        norms=tuple(norm if seen else None for norm, seen in zip(norms, reached, strict=True)), tokens=tokens
    )
