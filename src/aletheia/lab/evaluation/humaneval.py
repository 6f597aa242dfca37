"""HumanEval and MBPP: programs from completions, run in the sandbox, and pass@k. No torch.

A program passes if the harness proves, after the last test returned, that it knows a nonce drawn for this run.
Exiting early, a printed success message and caught exceptions prove nothing. A solution cannot see the tests while its
module runs, and its changes to builtins and trace functions are undone before the tests.

A solution that is written against this harness can still cheat, as it shares a process with its tests. It can search
the open descriptors for the nonce, change modules that the tests use (``math.isclose``), or return objects that equal
everything. The same holds for the reference implementation. Read suspicious solutions.

As in the reference implementation, the tests run once, in the namespace of the solution, whose ``__name__`` is not
``"__main__"``. Unlike there, a solution can neither import installed packages nor start threads or processes.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from math import comb

from aletheia.errors import SandboxError
from aletheia.lab.evaluation import sandbox

# Chen et al. 2021, sec. 2.3, in the spelling of lm-eval's humaneval task (``until``)
STOP_SEQUENCES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True, slots=True)
class Program:
    """One completion of one task, and the tests it has to pass. Several samples of a task share its name."""

    task: str
    solution: str
    tests: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended. ``reason`` is ``passed``, ``failed``, or the limit that it exceeded."""

    task: str
    passed: bool
    reason: str
    seconds: float
    output: str


def truncate(completion: str, stop_sequences: Sequence[str] = STOP_SEQUENCES) -> str:
    """The completion up to the first stop sequence; models may continue after the end of the function."""
    found = (completion.find(stop) for stop in stop_sequences)
    return completion[: min((place for place in found if place >= 0), default=len(completion))]


def humaneval_program(task: str, prompt: str, completion: str, test: str, entry_point: str) -> Program:
    """A program of HumanEval: prompt and completion form the module; ``test`` defines ``check(entry_point)``."""
    return Program(task, prompt + completion, f"{test}\ncheck({entry_point})\n")


def mbpp_program(task: str, completion: str, test_list: Iterable[str], test_setup: str = "") -> Program:
    """A program of MBPP: the completion is the module; ``test_setup`` and the assertions run after it."""
    return Program(task, completion, "\n".join([test_setup, *test_list]) + "\n")


def run_program(program: Program, *, unsafe: bool = False, limits: sandbox.Limits | None = None) -> Outcome:
    """Run one program in the sandbox or, with ``unsafe``, in a plain subprocess without a security boundary.

    Raises:
        SandboxError: the sandbox does not work here.
    """
    nonce = secrets.token_hex(16).encode()
    parts = [part.encode("utf-8", "surrogatepass") for part in (program.solution, program.tests)]
    payload = b"".join(b"%08x" % len(part) + part for part in (*parts, nonce))
    harness = resources.files("aletheia.lab.evaluation").joinpath("harness.py").read_text(encoding="utf-8")
    result = sandbox.run(harness, stdin=payload, limits=limits, name=program.task, unsafe=unsafe)
    passed = result.passed and result.output.endswith(nonce)
    reason = "passed" if passed else result.killed_by or "failed"
    return Outcome(program.task, passed, reason, result.seconds, result.text.removesuffix(nonce.decode()))


def score(
    programs: Sequence[Program],
    *,
    workers: int | None = None,
    unsafe: bool = False,
    limits: sandbox.Limits | None = None,
) -> list[Outcome]:
    """Run programs, ``workers`` at a time (default: one per usable processor); outcomes keep the order of ``programs``.

    With more workers than processors, programs time out that would pass alone.

    Raises:
        SandboxError: the sandbox does not work here; raised before the first program runs.
    """
    if workers is not None and workers < 1:
        raise SandboxError(f"found {workers} workers; expected 1 or more; leave it out for one per processor")
    if not unsafe:
        sandbox.check()
    pool = ThreadPoolExecutor(workers or _processors(), thread_name_prefix="sandbox")
    try:
        return list(pool.map(lambda program: run_program(program, unsafe=unsafe, limits=limits), programs))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, only running programs are awaited


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def estimate_pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of ``k`` samples passes, from ``correct`` of ``samples``.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021, eq. 1; computed exactly with integers instead of their product form.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"found samples={samples}, correct={correct}, k={k}; expected correct and k within samples")
    whole = comb(samples, k)
    return (whole - comb(samples - correct, k)) / whole


def pass_at_k(outcomes: Iterable[Outcome], k: int = 1) -> float:
    """Mean of the unbiased estimate over tasks; the outcomes of a task are its samples.

    Raises:
        ValueError: no outcome, or a task with fewer than ``k`` samples.
    """
    passed: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        passed[outcome.task].append(outcome.passed)
    if not passed:
        raise ValueError("found no outcome; expected at least one task")
    return sum(estimate_pass_at_k(len(flags), sum(flags), k) for flags in passed.values()) / len(passed)
