"""What a job would take on a machine, without running it: memory, disk, reads and time of probe, cache and training.

Formulas, with T tokens, D the model width, V the vocabulary, P parameters that a token passes through, W bytes of
weights, b bytes of an element, F operations and R bytes read per second, k the boundary:

- probe: ``max(4 T P / F, W / R)`` seconds (2 P forward, 2 P backward); streamed ``max(6 T P / F, 2 W / R)``, since
  layers run forward twice. Memory: the weights and the work on one layer; streamed, two layers and one as stored
  instead of all weights.
- cache: ``max(2 T P_below_k / F, W_below_k / R)``, for every row once. It takes ``T D b`` bytes on disk, and twice that
  while it is filled layer by layer.
- training: ``T (4 P_from_k + 6 P_adapters + 4 D V labelled) / F`` per pass. The cache is read once per pass. Memory is
  that of :func:`aletheia.planning.memory.training_bytes`. Steps in which every layer learns count all P.

The estimate counts matrix products and reads, and only the experts that a token passes through. It leaves out the
attention products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aletheia.anatomy.schema import Anatomy
from aletheia.planning.activations import Step
from aletheia.planning.memory import GPU_BYTES, PROCESS_BYTES, is_resident, known_weights, total_bytes, training_bytes
from aletheia.planning.plan import Plan
from aletheia.probing.scores import Scores, WeightBytes
from aletheia.settings import Settings, option

PROBE_BATCHES = 5


@dataclass(frozen=True)
class Machine:
    """A machine: memory in bytes, and what it reaches in practice of operations and bytes read from disk per second."""

    name: str
    memory: float
    flops: float
    read: float
    is_gpu: bool = False


@dataclass(frozen=True)
class Job:
    """A training job: how many rows and tokens per row, the share that is labelled, passes, and rows per batch."""

    rows: int
    tokens_per_row: int
    labelled_share: float
    epochs: float
    batch_size: int


class EstimateSettings(Settings):
    """The job that an estimate is for, where it differs from the data of the probe."""

    rows: int | None = option(None, "With `estimate`: rows to train on. (default: as many as the probe's data)", ge=1)
    tokens_per_row: int | None = option(
        None, "With `estimate`: mean tokens per row. (default: as the probe measured)", ge=1
    )
    batch_size: int = option(4, "With `estimate`: rows per batch.", ge=1)

    def job(self, scores: Scores, epochs: float) -> Job:
        """The job to estimate: what these settings say, and the data of the probe for all else."""
        probe = scores.probe
        known = scores.data.rows if scores.data else probe.batches * probe.batch_size
        mean = max(1, probe.tokens // (probe.batches * probe.batch_size))
        share = probe.labelled_tokens / probe.tokens
        return Job(self.rows or known, self.tokens_per_row or mean, share, epochs, self.batch_size)


@dataclass(frozen=True)
class Phase:
    """What a phase takes: peak memory of the process or the GPU, bytes on disk, bytes read, seconds."""

    name: str
    memory: float
    disk: float
    read: float
    seconds: float


def estimate(
    anatomy: Anatomy,
    weights: WeightBytes,
    layers: Sequence[int],
    ranks: Mapping[str, int],
    job: Job,
    machine: Machine,
    item_bytes: int,
    early: float = 0.0,
) -> list[Phase]:
    """Probe, cache and training of a plan that adapts ``layers``, in the order they run.

    Args:
        anatomy: anatomy of the whole model.
        weights: bytes of its parts in memory.
        layers: the adapted layers.
        ranks: rank by full module name.
        job: the data, and the passes over it.
        machine: the machine it runs on.
        item_bytes: bytes of one element of the hidden states.
        early: share of the steps in which every layer learns, before the cache is filled.
    """
    boundary = min(layers)
    tokens = job.rows * job.tokens_per_row
    streamed = not is_resident(weights, machine.memory)
    held = (GPU_BYTES if machine.is_gpu else PROCESS_BYTES) + (
        3 * max(weights.layers) if streamed else total_bytes(weights)
    )
    states = tokens * anatomy.hidden_size * item_bytes
    below, above = _parameters(anatomy, range(boundary)), _parameters(anatomy, range(boundary, anatomy.layer_count))
    work = _layer_work(anatomy, job.tokens_per_row)
    read = sum(weights.layers[:boundary]) if streamed else 0
    adapters = _adapter_parameters(anatomy, layers, ranks)
    head = 4 * anatomy.hidden_size * anatomy.vocab_size * job.labelled_share
    step_operations = (1 - early) * 4 * above + early * 4 * (below + above) + 6 * adapters + head
    step = Step(
        tokens=job.batch_size * job.tokens_per_row,
        row_tokens=job.tokens_per_row,
        labelled_share=job.labelled_share,
        dtype="float32" if item_bytes > 2 else "bfloat16",
        on_gpu=machine.is_gpu,
        resident=not streamed,
    )
    every = range(anatomy.layer_count)
    learning = [range(boundary, anatomy.layer_count), *([every] if early else [])]
    return [
        _probe_phase(anatomy, weights, job, machine, item_bytes, held + work),
        Phase(
            name="cache, streamed" if streamed else "cache",
            memory=held + job.batch_size * work,
            disk=(2 if streamed else 1) * states,
            read=read,
            seconds=max(tokens * 2 * below / machine.flops, read / machine.read),
        ),
        Phase(
            name="training",
            memory=max(training_bytes(anatomy, weights, those, ranks, step) for those in learning),
            disk=states,
            read=(1 - early) * job.epochs * states,
            seconds=job.epochs * tokens * step_operations / machine.flops,
        ),
    ]


def _probe_phase(
    anatomy: Anatomy, weights: WeightBytes, job: Job, machine: Machine, item_bytes: int, memory: float
) -> Phase:
    streamed = not is_resident(weights, machine.memory)
    tokens = PROBE_BATCHES * job.tokens_per_row
    operations = tokens * (6 if streamed else 4) * _parameters(anatomy, range(anatomy.layer_count))
    read = (2 if streamed else 1) * total_bytes(weights)
    return Phase(
        name="probe, streamed" if streamed else "probe",
        memory=memory,
        disk=anatomy.layer_count * tokens * anatomy.hidden_size * item_bytes if streamed else 0,
        read=read,
        seconds=max(operations / machine.flops, read / machine.read),
    )


def _adapter_parameters(anatomy: Anatomy, layers: Sequence[int], ranks: Mapping[str, int]) -> float:
    """Parameters of all adapters; of experts, only those that a token passes through."""
    return sum(
        module.lora_parameters(ranks[module.name]) * module.active_experts / module.experts
        for module in anatomy.modules
        if module.layer in layers and module.name in ranks
    )


MACHINES = (
    Machine("laptop, 16 GB", 16e9, 5e11, 2e9),
    Machine("GPU, 80 GB", 80e9, 1.5e14, 3e9, is_gpu=True),
    Machine("8 GPUs, 640 GB", 640e9, 1.2e15, 3e9, is_gpu=True),
)


def estimate_plan(plan: Plan, scores: Scores, job: Job, machine: Machine) -> list[Phase]:
    """:func:`estimate` of a plan that was made from ``scores``.

    Raises:
        PlanError: the scores hold no weight sizes.
    """
    ranks = {adapter.name: adapter.rank for adapter in plan.adapters}
    item = 4 if plan.probe.dtype == "float32" else 2
    return estimate(scores.anatomy, known_weights(scores), plan.layers, ranks, job, machine, item, plan.freeze_after)


def _parameters(anatomy: Anatomy, layers: Sequence[int]) -> float:
    """Matrix elements of layers that one token passes through."""
    wanted = set(layers)
    return sum(module.flops_per_token / 2 for module in anatomy.modules if module.layer in wanted)


def _layer_work(anatomy: Anatomy, tokens: int) -> float:
    """Bytes of one layer's activations and their gradients for a row, as the streamed probe counts them."""
    widths = [
        sum(module.features_per_token for module in anatomy.in_layer(layer)) for layer in range(anatomy.layer_count)
    ]
    return 4 * 3 * tokens * max(widths)
