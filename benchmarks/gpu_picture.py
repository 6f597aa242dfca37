"""Draw docs/results/gpu/gpu-steps.svg: tokens per second of every arm that benchmarks/gpu.py measured.

.venv/bin/python benchmarks/gpu_picture.py docs/results/gpu/h200-steps.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from pictures import small_svg

PICTURE = Path(__file__).parents[1] / "docs" / "results" / "gpu" / "gpu-steps.svg"
OURS, THEIRS, INK = "#1a7f5a", "#9aa0a6", "#202124"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    arms = [arm for arm in found["arms"] if "step_seconds" in arm]
    models = [model for model in found["models"] if any(arm["model"] == model for arm in arms)]
    counts = [sum(arm["model"] == model for arm in arms) for model in models]
    pyplot.rcParams |= {"font.family": "sans-serif", "font.size": 9, "text.color": INK}
    figure, axes = pyplot.subplots(
        len(models), 1, figsize=(7.2, 0.36 * sum(counts) + 0.9 * len(models)), squeeze=False,
        gridspec_kw={"height_ratios": counts}, layout="constrained",
    )  # fmt: skip
    for axis, model in zip(axes[:, 0], models, strict=True):
        draw(axis, found["models"][model]["shape"], [arm for arm in arms if arm["model"] == model])
    figure.suptitle(f"Real tokens per second, one {found['about']['device']}", x=0.01, ha="left", weight="bold")
    PICTURE.write_text(small_svg(figure))


def draw(axis: pyplot.Axes, shape: str, arms: list[dict[str, object]]) -> None:
    names = [str(arm["name"]) for arm in arms]
    rates = [sum(arm["tokens"]) / sum(arm["step_seconds"]) for arm in arms]
    bars = axis.barh(names, rates, color=[OURS if name.startswith("ours") else THEIRS for name in names], height=0.66)
    axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4)
    axis.invert_yaxis()
    axis.set_title(f"random weights, shape of {shape}", loc="left", fontsize=9)
    axis.set_xlim(0, 1.14 * max(rates))
    axis.xaxis.set_visible(False)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
