"""Numbers and names for people, the same in the terminal and on the page."""

from collections.abc import Iterable

from aletheia.names import printable
from aletheia.planning.plan import Adapter, PlanSettings

NOTHING = "\N{EN DASH}"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def human_count(number: int) -> str:
    """``9,216``, ``51.2 k``, ``4.88 M``, ``1.24 B``: exact below ten thousand, else three digits."""
    if abs(number) < 10_000:
        return f"{number:,}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "B")):
        if abs(float(f"{number / size:.3g}")) < 1000:
            return f"{_three_digits(number / size)} {unit}"
    return f"{_three_digits(number / 1e12)} T"


def human_bytes(size_bytes: int) -> str:
    """``512 B``, ``1.91 GiB``: powers of 1024, three digits."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(float(f"{value:.4g}")) < 1000:
            return f"{_three_digits(value)} {unit}"
    return f"{_three_digits(value / 1024)} TiB"


def human_seconds(seconds: float) -> str:
    """``42.0 ms``, ``7.14 s``, ``112 s``, ``12 min 05 s``, ``2 h 05 min``."""
    if 0 < seconds < 0.9995:
        return f"{_three_digits(seconds * 1000)} ms"
    if seconds < 599.5:
        return f"{_three_digits(seconds)} s" if seconds else "0 s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_percent(share: float) -> str:
    """``37 %``, ``4.2 %``, ``99.7 %``: a share of one with two digits, and never 100 % for less than all."""
    percent = 100 * share
    one_decimal = round(percent, 1)
    if abs(one_decimal) < 10 or 99.5 <= abs(one_decimal) < 100:
        return f"{one_decimal:.1f} %" if one_decimal else "0 %"
    return f"{percent:.0f} %"


def human_ratio(ratio: float | None) -> str:
    """``1.58x``."""
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def human_loss(loss: float) -> str:
    """Nats per token with three decimals."""
    return f"{loss:.3f}"


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    decimals = 2 if abs(rounded) < 10 else 1 if abs(rounded) < 100 else 0
    return f"{rounded:.{decimals}f}"


def bar(value: float, highest: float, width: int) -> str:
    """A bar of at most ``width`` characters, in steps of an eighth of a character."""
    if not value > 0 or not highest > 0:
        return ""
    eighths = max(1, round(8 * width * min(1.0, value / highest)))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters, cut in the middle: both ends of a name distinguish runs."""
    text = printable(text)
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def model_name(name: str) -> str:
    """The name of a model: a hub id as it is, a path by its last part."""
    is_path = name.startswith(("/", "./", "../", "~"))
    return (is_path and name.rstrip("/").rpartition("/")[2]) or name


def rank_summary(adapters: Iterable[Adapter]) -> str:
    """Ranks by role, e.g. ``attention 16, mlp 64``; a range where the modules of a role differ."""
    by_role: dict[str, set[int]] = {}
    for adapter in adapters:
        by_role.setdefault(adapter.role, set()).add(adapter.rank)
    return ", ".join(f"{role.replace('_', ' ')} {_span(ranks)}" for role, ranks in by_role.items())


def alpha_summary(settings: PlanSettings) -> str:
    """Alpha, and how it scales an adapter: ``32 at rank 16`` or ``32, scaled as rsLoRA``; and dropout, if any."""
    alpha = f"{settings.common_alpha:g}"
    text = f"{alpha}, scaled as rsLoRA" if settings.rslora else f"{alpha} at rank {settings.rank}"
    return f"{text}, dropout {settings.dropout:g}" if settings.dropout else text


def _span(ranks: set[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"
