"""What a measurement found, and the table of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN = 3  # of what broke a promise, in full


@dataclass
class Line:
    """One promise: how often it was put to the test, and each time that it was broken, in a sentence."""

    promise: str
    times: int = 0
    broken: list[str] = field(default_factory=list)
    note: str = ""

    def hold(self, held: bool, otherwise: str) -> None:
        """One more test of it."""
        self.times += 1
        if not held:
            self.broken.append(otherwise)

    @property
    def kept(self) -> bool:
        return self.times > 0 and not self.broken  # what was never put to the test is not kept


def table(name: str, lines: Iterable[Line]) -> str:
    """As Markdown; below it what broke."""
    lines = list(lines)
    rows = [("promise", "times", "broken", "")]
    rows += [(line.promise, f"{line.times:,}", f"{len(line.broken):,}", line.note) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, ("-" * widths[0], "-" * (widths[1] - 1) + ":", "-" * (widths[2] - 1) + ":", "-" * widths[3]))
    text = [f"\n{name}\n"]
    for number, (promise, times, broken, note) in enumerate(rows):
        counts = (times, broken) if number == 1 else (times.rjust(widths[1]), broken.rjust(widths[2]))
        text.append(f"| {promise.ljust(widths[0])} | {counts[0]} | {counts[1]} | {note.ljust(widths[3])} |")
    for line in lines:
        text += [f"BROKEN, {line.promise}: {sentence}" for sentence in line.broken[:SHOWN]]
        if len(line.broken) > SHOWN:
            text.append(f"... and {len(line.broken) - SHOWN:,} times more")
        if not line.times:
            text.append(f"NOT TESTED, {line.promise}")
    return "\n".join(text)
