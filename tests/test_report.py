"""The report is one well-formed page that needs nothing else, says what it was given and escapes it."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip3o.evaluate.charts import HEIGHT, WIDTH, loss_chart
from blip3o.evaluate.report import Answer, Choice, Curve, Report, report_html
from blip3o.evaluate.samples import Drawings, samples_png
from blip3o.evaluate.scores import GENERATION_CATEGORIES, generation_scores, metrics, understanding_scores

NASTY = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, their attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def pictures(n: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def content() -> dict[str, object]:
    verdicts = {name: torch.eye(4, dtype=torch.bool) for name in (*GENERATION_CATEGORIES, "held_out")}
    correct = {"colour": torch.tensor([True, False]), NASTY: torch.tensor([True]), "held_out": torch.tensor([True])}
    return metrics(
        generation_scores(verdicts),
        understanding_scores(correct),
        understanding_unchanged=True,
        seconds={"clip": 30.0, NASTY: 90.0},
        parameters={"dit": 1_234_567, NASTY: 3},
    )


def full_report() -> Report:
    return Report(
        title=f"Title {NASTY}",
        summary=f"Summary {NASTY}",
        metrics=content(),
        drawings=(
            Drawings("position", f"draw {NASTY}", pictures(4), (True, False, False, True)),
            Drawings(NASTY, "draw a circle", pictures(4, 1), (True,) * 4),
        ),
        answers=(
            Answer(pictures(1)[0], NASTY, f"what {NASTY}", f"left {NASTY}", f"right {NASTY}"),
            Answer(pictures(1)[0], "colour", "what colour", "red", "red"),
        ),
        curves=(Curve(f"stage {NASTY}", tuple(range(300)), tuple(1.0 / (i + 1) for i in range(300))),),
        choices=(Choice(f"op {NASTY}", f"inputs {NASTY}", f"backend {NASTY}", f"why {NASTY}"),),
        configuration={"name": NASTY, "dit": {"width": 128, NASTY: 1}},
        versions={f"torch {NASTY}": NASTY},
    )


def test_the_page_is_whole_and_needs_nothing(tmp_path: Path) -> None:
    report_html(tmp_path / "report.html", full_report())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>")
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert links and all(link is not None and link.startswith("data:") for link in links)
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert "prefers-color-scheme:dark" in text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_every_text_is_shown_and_escaped(tmp_path: Path) -> None:
    report = full_report()
    report_html(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "alert('x')" not in text
    for words in (
        "Title ",
        "Summary ",
        "draw ",
        "what ",
        "left ",
        "right ",
        "stage ",
        "op ",
        "inputs ",
        "why ",
        "torch ",
    ):
        assert words + NASTY in page.text, words
    assert f"dit.{NASTY}" in page.text and "1,234,567" in page.text and "2.0 min" in page.text
    for words in ("0.250", "Attribute binding", "Held-out pairs", "bit for bit", "Why", "128"):
        assert words in page.text, words
    low, high = content()["intervals"]["generation.overall"]  # type: ignore[index]
    assert f"{low:.3f} – {high:.3f}" in page.text


def test_pictures_marks_and_numbers_are_those_given(tmp_path: Path) -> None:
    report = full_report()
    report_html(tmp_path / "report.html", report)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    images = page.named("img")
    assert len(images) == 10 and all(image["alt"] for image in images)
    source = images[1]["src"]
    assert source is not None
    shown = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
    expected = (pictures(4)[1] * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert shown.size == (32, 32) and shown.tobytes() == bytes(expected.flatten().tolist())
    labels = [attrs.get("aria-label") for attrs in page.named("svg")]
    assert labels.count("right") == 7 and labels.count("wrong") == 3
    (link,) = [attrs for attrs in page.named("a") if attrs.get("download") == "metrics.json"]
    assert link["href"] is not None
    assert json.loads(base64.b64decode(link["href"].split(",", 1)[1])) == report.metrics


def test_empty_sections_are_left_out_and_bytes_repeat(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report_html(tmp_path / name, full_report())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    report_html(tmp_path / "small", Report(title="T", summary="", metrics=content()))
    small, full = ((tmp_path / name).read_text(encoding="utf-8") for name in ("small", "a"))
    for words in ("Drawings", "Questions", "Training", "What ran where", "Configuration and versions"):
        assert f"<h2>{words}</h2>" in full and f"<h2>{words}</h2>" not in small, words
    assert "<h2>Scores</h2>" in small
    with pytest.raises(ValueError, match="metrics: expected a mapping at 'intervals', got NoneType"):
        report_html(tmp_path / "bad", Report("T", "", {"generation": {}, "understanding": {}}))
    assert not (tmp_path / "bad").exists()
    changed = {**content(), "understanding_unchanged": False}
    report_html(tmp_path / "changed", Report("T", "", changed))
    assert "not the same" in (tmp_path / "changed").read_text(encoding="utf-8")


def points(svg: str, name: str) -> list[tuple[float, float]]:
    match = re.search(rf'class="{name}" points="([^"]+)"', svg)
    assert match
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in match[1].split())]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0 / (i + 1) for i in range(1000)],
        [0.43 + 0.001 * math.sin(i) for i in range(777)],
        [-3.0, 2.0, 5.0],
        [0.0],
        [1e-9, 1e9],
        [2.5] * 50,
    ],
)
def test_curves_stay_in_their_frame(losses: list[float]) -> None:
    svg = loss_chart("s", [10 * i for i in range(len(losses))], losses)
    Page(svg)
    line, band = points(svg, "mean"), points(svg, "band")
    assert len(line) == len(band) // 2 <= 120
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line + band)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert all(low >= y >= high for (_, y), (_, high), (_, low) in zip(line, band, reversed(band), strict=False))


def test_curves_fall_with_the_loss_and_count_what_cannot_be_drawn() -> None:
    svg = loss_chart("s", range(200), [math.exp(-i / 20) for i in range(200)])
    heights = [y for _, y in points(svg, "mean")]
    assert heights == sorted(heights)
    steps = [later - before for before, later in pairwise(heights)]
    assert max(steps[1:-1]) - min(steps[1:-1]) < 0.5, "an exponential is a straight line on a logarithmic axis"
    broken = loss_chart("s", range(4), [1.0, math.nan, math.inf, 0.5])
    assert "2 not finite" in broken and len(points(broken, "mean")) == 2
    assert "1 not finite" in loss_chart("s", [0], [math.nan])


def test_samples_sheet(tmp_path: Path) -> None:
    rows = [Drawings("counting", f"please draw exactly {i} very large red triangles", pictures(4, i), (True, False) * 2)
            for i in range(5)]  # fmt: skip
    samples_png(tmp_path / "samples.png", rows)
    sheet = Image.open(tmp_path / "samples.png").convert("RGB")
    wide, high = sheet.size
    assert wide > 2 * 4 * 128 and high > 3 * 128
    data = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(high, wide, 3)
    for row in rows:
        for picture in row.pictures:
            tile = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
            tile = tile[8:].repeat_interleave(4, 0).repeat_interleave(4, 1)  # below the marks
            corner = (data[:, :, :] == tile[0, 0]).all(-1).nonzero().tolist()
            hits = [(y, x) for y, x in corner if torch.equal(data[y : y + tile.shape[0], x : x + 128], tile)]
            assert len(hits) == 1, "each drawing is on the sheet once, enlarged without smoothing"
    samples_png(tmp_path / "again.png", rows)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "samples.png").read_bytes()
    long = [Drawings("position", "word " * 60, pictures(4), (True,) * 4)]
    samples_png(tmp_path / "long.png", long)
    assert Image.open(tmp_path / "long.png").size[1] > 300, "a long prompt makes its row higher, nothing is cut off"


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pictures: expected a float tensor \[S, 3, H, W\], got torch.float32 \[3, 32, 32\]"
    ):
        Drawings("position", "p", pictures(1)[0], (True,))
    with pytest.raises(ValueError, match="verdicts: expected 4, one per picture, got 1"):
        Drawings("position", "p", pictures(4), (True,))
    with pytest.raises(ValueError, match="picture: expected finite values"):
        Answer(torch.full((3, 8, 8), math.nan), "k", "q", "a", "b")
    with pytest.raises(ValueError, match="picture: expected a float tensor"):
        Answer(torch.zeros(3, 8, 8, dtype=torch.uint8), "k", "q", "a", "b")
    with pytest.raises(ValueError, match="losses: expected one per step"):
        Curve("s", (1, 2), (0.5,))
    with pytest.raises(ValueError, match="rows: expected at least one"):
        samples_png(tmp_path / "x.png", [])
    mixed = [Drawings("a", "p", pictures(4), (True,) * 4), Drawings("a", "p", pictures(2), (True,) * 2)]
    with pytest.raises(ValueError, match="rows: expected pictures of one shape"):
        samples_png(tmp_path / "x.png", mixed)
    assert not list(tmp_path.iterdir())
