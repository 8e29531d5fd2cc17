"""Loss curves as inline SVG: no script, no library; colours come from the page's CSS classes."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
BUCKETS = 120


def loss_chart(stage: str, steps: Sequence[int], losses: Sequence[float]) -> str:
    """A ``<figure>`` with the curve of one stage: the mean line and the smallest-to-largest band of neighbouring steps.

    The vertical axis is logarithmic where all losses are positive and span more than a factor of 8. Losses that are not
    finite cannot be drawn; the caption counts them.
    """
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    lost = len(losses) - len(kept)
    warning = f" · <strong>{lost} not finite</strong>" if lost else ""
    if not kept:
        return f"<figure><figcaption><strong>{escape(stage)}</strong>{warning}</figcaption></figure>"
    buckets = _buckets(kept)
    low, high = min(b[2] for b in buckets), max(b[3] for b in buckets)
    log = low > 0.0 and high / low > 8.0
    ticks = _log_ticks(low, high) if log else _linear_ticks(low, high, 4)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    start, end = kept[0][0], max(kept[-1][0], kept[0][0] + 1)

    def x(step: float) -> str:
        return f"{LEFT + (step - start) / (end - start) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(loss: float) -> str:
        share = math.log(loss / low) / math.log(high / low) if log else (loss - low) / (high - low)
        return f"{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick)}" dy="3.5" text-anchor="end">{tick:g}</text>')
    for tick in (tick for tick in _linear_ticks(start, end, 4) if start <= tick <= end):
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,g}</text>')
    forth = [f"{x(b[0])},{y(b[3])}" for b in buckets]
    back = [f"{x(b[0])},{y(b[2])}" for b in reversed(buckets)]
    line = " ".join(f"{x(b[0])},{y(b[1])}" for b in buckets)
    last = buckets[-1]
    parts.append(f'<polygon class="band" points="{" ".join(forth + back)}"/><polyline class="mean" points="{line}"/>')
    parts.append(f'<circle class="end" cx="{x(last[0])}" cy="{y(last[1])}" r="2.6"/>')
    caption = f"<strong>{escape(stage)}</strong> · loss {last[1]:.4g} after {kept[-1][0]:,} steps{warning}"
    label = escape(f"Loss of stage {stage} over steps {start} to {kept[-1][0]}")
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _buckets(points: Sequence[tuple[int, float]]) -> list[tuple[float, float, float, float]]:
    """At most BUCKETS runs of neighbours as (mean step, mean, smallest, largest loss)."""
    size = math.ceil(len(points) / BUCKETS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    table = []
    for run in runs:
        losses = [loss for _, loss in run]
        step = math.fsum(step for step, _ in run) / len(run)
        mean = min(max(losses), max(min(losses), math.fsum(losses) / len(run)))
        table.append((step, mean, min(losses), max(losses)))
    return table


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about ``count`` of them, from at or below ``low`` to at or above
    ``high``."""
    span = high - low if high > low else max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten (powers alone over more than three decades) from at or below ``low`` upwards."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low <= 1000.0 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    below = max(t for t in ticks if t <= low)
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]
