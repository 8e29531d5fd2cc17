"""The roofline plot: how fast each op computes, by how much it computes on a byte, under what the machine allows.

Every memory-bound op lies left of the ridge, under the slope of the copy; matrix products lie right of it, under the
flat roof of their dtype. A line joins our point with the best peer's, so its length is the lead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle
from pathlib import Path

from measure import OURS, Row, groups

WIDTH, HEIGHT = 880, 560
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 48, 52
COLOURS = (
    "#1f6fb2", "#c8553d", "#3f8f4f", "#7d5ba6", "#b8860b", "#2a9d9d", "#b03a72", "#5c6670",
    "#8a5a2b", "#4460c4", "#94a11f", "#d0782a", "#2f7d6b", "#9c4dcc", "#a83232",
)  # fmt: skip
STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#e6e6e6}.roof{stroke:#555;stroke-width:1.5;fill:none}"
    ".title{font-size:15px;font-weight:600}"
)


class Axes:
    """Logarithmic axes around the points, and where a point lies on the page."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.x, self.y = (self._range([point[i] for point in points]) for i in range(2))

    @staticmethod
    def _range(values: Sequence[float]) -> tuple[int, int]:
        return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.01))

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        parts = []
        for power in range(self.x[0], self.x[1] + 1):
            x, bottom = self.place(10.0**power, 10.0 ** self.y[0])
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{10.0**power:g}</text>')
        for power in range(self.y[0], self.y[1] + 1):
            _, y = self.place(10.0 ** self.x[0], 10.0**power)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        return parts


def point(row: Row) -> tuple[float, float]:
    """Operations on a byte, and billions of operations a second."""
    assert row.intensity and row.gbps
    return row.intensity, row.intensity * row.gbps


def panel(dtype: str, rows: Sequence[Row], limits: Sequence[Row], colours: dict[str, str]) -> str:
    """The plot of one dtype as SVG. colours: of the ops, the same in every plot."""
    copy = next(row.gbps for row in limits if row.gbps)
    product = next(1e3 * row.tflops for row in limits if row.tflops and row.dtype == dtype)
    assert copy is not None
    ours, pairs = {}, []
    for key, group in groups(rows).items():
        mine = [row for row in group if row.provider in OURS and row.gbps and row.intensity]
        peers = [row for row in group if row.provider not in OURS and row.gbps and row.intensity and row.checked]
        if mine:
            ours[key] = min(mine, key=lambda row: row.median_us or math.inf)
            pairs.append((ours[key], min(peers, key=lambda row: row.median_us or math.inf, default=None)))
    ridge = product / copy
    everything = [point(row) for pair in pairs for row in pair if row]
    axes = Axes([*everything, (ridge, product), (min(x for x, _ in everything), product)])
    least, most = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    start = max(least, 10.0 ** axes.y[0] / copy)
    roof = [axes.place(start, copy * start), axes.place(min(ridge, most), min(product, copy * most))]
    roof += [axes.place(most, product)] if most > ridge else []
    parts = [*axes.grid()]
    parts.append('<polyline class="roof" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in roof) + '"/>')
    names = list(dict.fromkeys(row.op for row, _ in pairs))
    for best, peer in pairs:
        colour = colours[best.op]
        x, y = axes.place(*point(best))
        title = f"<title>{escape(' '.join(best.key[:4]))}: {best.median_us:.1f} µs</title>"
        if peer:
            px, py = axes.place(*point(peer))
            parts.append(
                f'<line x1="{x:.1f}" x2="{px:.1f}" y1="{y:.1f}" y2="{py:.1f}" stroke="{colour}" opacity="0.5"/>'
            )
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="white" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>')
    for i, name in enumerate(names):
        y = TOP + 18 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{y}" r="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y + 4}">{escape(name)}</text>')
    title = f"{dtype}: copy {copy:.1f} GB/s, products {product:.0f} GFLOP/s; full: ours, hollow: the best peer"
    parts.append(f'<text class="title" x="{LEFT}" y="26">{escape(title)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">operations a byte</text>'
    )
    parts.append(f'<text x="{LEFT - 8}" y="{TOP - 8}" text-anchor="end">Gop/s</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )


def plot(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Writes roofline_<dtype>.svg for each dtype among `rows`, which hold the limits of their run too."""
    rows = list(rows)
    limits = [row for row in rows if row.op == "limit"]
    if not limits:
        raise ValueError("rows: expected the limits of the run among them, found none")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.op != "limit"]
    colours = dict(zip(dict.fromkeys(row.op for row in rows), cycle(COLOURS), strict=False))
    written = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        path = folder / f"roofline_{dtype}.svg"
        path.write_text(panel(dtype, [row for row in rows if row.dtype == dtype], limits, colours))
        written.append(path)
    return written
