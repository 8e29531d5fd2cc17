"""What came out of a run, as one self-contained page, ``report.html``.

The page holds its pictures as base64 PNG and its charts as inline SVG; it needs no script and no network, follows the
reader's light or dark setting, and escapes every text it is given. The same inputs give the same bytes.

Shapes: S drawings of a prompt, H x W pixels; pictures are float [.., 3, H, W] with values in [0, 1] (clamped to it).
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from torch import Tensor

from blip3o.evaluate.charts import loss_chart
from blip3o.evaluate.samples import NAMES, Drawings, check_pictures, to_image
from blip3o.evaluate.scores import GENERATION_CATEGORIES, HELD_OUT, OVERALL
from blip3o.evaluate.style import CROSS, STYLE, TICK


@dataclass(frozen=True)
class Answer:
    """One question about a ``picture`` float [3, H, W], the model's answer and the expected one."""

    picture: Tensor
    kind: str
    question: str
    answer: str
    expected: str

    def __post_init__(self) -> None:
        check_pictures("picture", self.picture, 3)

    @property
    def right(self) -> bool:
        return self.answer == self.expected


@dataclass(frozen=True)
class Curve:
    """The loss of one training stage: ``losses[i]`` was measured at step ``steps[i]``."""

    stage: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.losses):
            raise ValueError(
                f"losses: expected one per step and at least one, got {len(self.losses)} for {len(self.steps)}"
            )


@dataclass(frozen=True)
class Choice:
    """Which backend ran an op on which inputs, and why, as ``blip3o_kernels.explain`` tells it."""

    op: str
    inputs: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything the page shows. ``metrics`` is the content of ``metrics.json`` (``scores.metrics``); ``configuration``
    may be nested; ``summary`` is one or two sentences under the title."""

    title: str
    summary: str
    metrics: Mapping[str, object]
    drawings: tuple[Drawings, ...] = ()
    answers: tuple[Answer, ...] = ()
    curves: tuple[Curve, ...] = ()
    choices: tuple[Choice, ...] = ()
    configuration: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def report_html(path: str | Path, report: Report) -> None:
    """Writes ``report`` as one page. Sections without content are left out. ValueError for a metrics content without
    the keys ``generation``, ``understanding`` and ``intervals``, or for a picture with values that are not finite."""
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{escape(report.summary)}</p>" if report.summary else "",
        _headline(report.metrics),
        _score_section(report.metrics),
        _drawing_section(report.drawings, report.metrics),
        _answer_section(report.answers),
        _curve_section(report.curves),
        _choice_section(report.choices),
        _ledger_section(report),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _headline(metrics: Mapping[str, object]) -> str:
    intervals = _table(metrics, "intervals")
    entries = []
    for group, title in (("generation", "Generation"), ("understanding", "Understanding")):
        for name, words in ((OVERALL, title), (HELD_OUT, f"{title}, held out")):
            if name in _table(metrics, group):
                value = _table(metrics, group)[name]
                entries.append((words, _number(value), _interval(intervals.get(f"{group}.{name}"))))
    if "seconds" in metrics:
        seconds = sum(float(str(value)) for value in _table(metrics, "seconds").values())
        entries.append(("Total time", _duration(seconds), "all stages"))
    cells = (
        f"<div><dt>{escape(words)}</dt><dd>{escape(value)}<small>{escape(under)}</small></dd></div>"
        for words, value, under in entries
    )
    return f'<dl class="heads">{"".join(cells)}</dl>'


def _score_section(metrics: Mapping[str, object]) -> str:
    unchanged = metrics.get("understanding_unchanged")
    parts = ["<h2>Scores</h2>"]
    notes = {
        "generation": "Share of drawings that show exactly what was asked for, by a judge that reads pixels. Prompts "
        "are unseen. Overall is the mean of the six categories; held-out pairs were never seen in training.",
        "understanding": "Share of questions on unseen pictures answered exactly. Overall is the mean of the types.",
    }
    for group, title in (("generation", "Generation"), ("understanding", "Understanding")):
        parts.append(f'<h3>{title}</h3><p class="note">{notes[group]}</p>{_score_table(group, metrics)}')
    if unchanged is not None:
        words = "is bit for bit the same" if unchanged else "is <strong>not the same</strong>"
        parts.append(f'<p class="note">Understanding {words} after the generation stage as before it.</p>')
    data = base64.b64encode(json.dumps(metrics, indent=2).encode()).decode()
    parts.append(
        '<p class="note">Thin lines are 95 % intervals over prompts or questions; they do not cover the randomness of '
        f'training. <a download="metrics.json" href="data:application/json;base64,{data}">metrics.json</a></p>'
    )
    return "".join(parts)


def _score_table(group: str, metrics: Mapping[str, object]) -> str:
    intervals, counts = _table(metrics, "intervals"), _table(metrics, "counts") if "counts" in metrics else {}
    rows = []
    for name, value in _table(metrics, group).items():
        interval, count = intervals.get(f"{group}.{name}"), counts.get(f"{group}.{name}", "")
        rows.append(
            f'<tr class="{"first" if name == OVERALL else ""}"><td>{escape(_name(name))}</td>'
            f'<td class="n">{_number(value)}</td><td class="n">{_interval(interval)}</td>'
            f'<td class="bar">{_bar(value, interval)}</td><td class="n">{escape(str(count))}</td></tr>'
        )
    unit = "Prompts" if group == "generation" else "Questions"
    head = f'<tr><th></th><th class="n">Score</th><th class="n">95 %</th><th></th><th class="n">{unit}</th></tr>'
    return f'<div class="wide"><table class="scores">{head}{"".join(rows)}</table></div>'


def _drawing_section(drawings: Sequence[Drawings], metrics: Mapping[str, object]) -> str:
    if not drawings:
        return ""
    scores = _table(metrics, "generation")
    parts = ["<h2>Drawings</h2>"]
    order = [*GENERATION_CATEGORIES, HELD_OUT]
    order += [name for name in dict.fromkeys(d.category for d in drawings) if name not in order]
    for category in order:
        rows = [d for d in drawings if d.category == category]
        if rows:
            score = f" <small>{_number(scores[category])}</small>" if category in scores else ""
            cards = "".join(
                f'<div><p>{escape(d.prompt)}</p><div class="row">'
                + "".join(_shot(p, d.prompt, right) for p, right in zip(d.pictures, d.verdicts, strict=True))
                + "</div></div>"
                for d in rows
            )
            parts.append(f'<h3>{escape(_name(category))}{score}</h3><div class="cards">{cards}</div>')
    return "".join(parts)


def _answer_section(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    parts = ["<h2>Questions</h2>"]
    for kind in dict.fromkeys(a.kind for a in answers):
        cards = []
        for a in (a for a in answers if a.kind == kind):
            given = f'<span class="{"ok" if a.right else "no"}-text">{escape(a.answer) or "(nothing)"}</span>'
            truth = "" if a.right else f' <span class="why">expected {escape(a.expected)}</span>'
            shot = _shot(a.picture, a.question, a.right)
            cards.append(f'<div class="ask">{shot}<div><p>{escape(a.question)}</p><p>{given}{truth}</p></div></div>')
        parts.append(f'<h3>{escape(_name(kind))}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def _curve_section(curves: Sequence[Curve]) -> str:
    if not curves:
        return ""
    charts = "".join(loss_chart(curve.stage, curve.steps, curve.losses) for curve in curves)
    note = "Line: mean of neighbouring steps. Band: their smallest and largest loss."
    return f'<h2>Training</h2><p class="note">{note}</p><div class="charts">{charts}</div>'


def _choice_section(choices: Sequence[Choice]) -> str:
    if not choices:
        return ""
    rows = (
        (f"<code>{escape(c.op)}</code>", f"<code>{escape(c.inputs)}</code>", escape(c.backend), escape(c.reason))
        for c in choices
    )
    return "<h2>What ran where</h2>" + _plain_table(("Op", "Inputs", "Backend", "Why"), rows)


def _ledger_section(report: Report) -> str:
    costs = []
    if "seconds" in report.metrics:
        rows = [(escape(stage), _duration(float(str(s)))) for stage, s in _table(report.metrics, "seconds").items()]
        costs.append(_plain_table(("Stage", "Time"), rows))
    if "parameters" in report.metrics:
        rows = [(escape(name), f"{int(str(n)):,}") for name, n in _table(report.metrics, "parameters").items()]
        costs.append(_plain_table(("Part", "Parameters"), rows))
    parts = [f'<h2>Time and parameters</h2><div class="pair">{"".join(costs)}</div>'] if costs else []
    details = [("Configuration", report.configuration), ("Versions", report.versions)]
    if any(content for _, content in details):
        parts.append("<h2>Configuration and versions</h2>")
    for title, content in details:
        if content:
            cells = [
                (f"<code>{escape(name)}</code>", f"<code>{escape(value)}</code>") for name, value in _flat(content)
            ]
            parts.append(f"<details><summary>{title}</summary>{_plain_table(('Name', 'Value'), cells)}</details>")
    return "".join(parts)


def _plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``rows`` hold HTML: the caller escapes."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _shot(picture: Tensor, words: str, right: bool) -> str:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    mark = TICK if right else CROSS
    return f'<div class="shot"><img src="data:image/png;base64,{data}" alt="{escape(words)}">{mark}</div>'


def _bar(value: object, interval: object) -> str:
    share = 100.0 * float(str(value))
    whisker = ""
    if isinstance(interval, Sequence):
        low, high = (100.0 * float(bound) for bound in interval)
        whisker = f'<b style="left:{low:.2f}%;width:{max(high - low, 0.3):.2f}%"></b>'
    return f'<div class="track"><i style="width:{share:.2f}%"></i>{whisker}</div>'


def _table(metrics: Mapping[str, object], key: str) -> Mapping[str, object]:
    table = metrics.get(key)
    if not isinstance(table, Mapping):
        raise ValueError(f"metrics: expected a mapping at {key!r}, got {type(table).__name__}")
    return table


def _name(name: str) -> str:
    return NAMES.get(name, name.replace("_", " ").capitalize())


def _number(value: object) -> str:
    return f"{float(str(value)):.3f}"


def _interval(interval: object) -> str:
    return f"{float(interval[0]):.3f} – {float(interval[1]):.3f}" if isinstance(interval, Sequence) else ""


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _flat(content: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        rows += _flat(value, f"{key}.") if isinstance(value, Mapping) else [(key, str(value))]
    return rows
