"""The default learning rate of a run, and its warm-up. No torch."""

import math

SHORT_RUN_STEPS = 200


def default_learning_rate(hidden_size: int, steps: int, passes: float = 1.0) -> float:
    """Peak learning rate for LoRA at alpha = 2 x rank: ``5e-5 x m x (2000 / hidden)^0.781``, m from 15 down to 10.

    For more than one pass over the data, the rate is divided by the square root of ``passes``. For a run that averages
    its weights, give 1 for ``passes``.

    This is the fit of Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025), over Llama models. The best
    rate is 10 times that of full fine-tuning, or 15 times in short runs. It falls with width and hardly depends on
    rank. Here m is 15 up to 200 steps and ``10 + 1000 / steps`` beyond. That gives 2.0e-3 for a width of 576 and 150
    steps, and 2.9e-4 for a width of 4,096 and long runs. Their fit for Qwen is flatter; the two agree within 2x between
    widths of 800 and 5,000.

    With a high rate, repeated rows are overfitted sooner unless weights are averaged. SmolLM2 was trained for three
    passes on three tasks with three seeds each. Without an average, 1.1e-3 ends between 0.6 % above and 1.2 % below
    twice that rate. With an average, 1.9e-3 ends between 1.5 % below and 0.2 % above 1.1e-3. In 40 and 150 steps, 2e-3
    is about the best of three rates (docs/results/defaults).
    """
    multiplier = 10 + 5 * min(1.0, SHORT_RUN_STEPS / steps)
    by_width: float = (2000 / hidden_size) ** 0.781
    return 5e-5 * multiplier * by_width / math.sqrt(max(1.0, passes))


def warm_up_steps(asked: float, steps: int) -> int:
    """Warm-up steps in a run of ``steps``: ``asked``, or this share of the steps if it is below 1, but never all.

    The first warm-up step has rate 0, so a run of one step that is all warm-up would learn nothing.
    """
    wanted = int(asked) if asked >= 1 else math.ceil(asked * steps)
    return min(wanted, steps - 1)
