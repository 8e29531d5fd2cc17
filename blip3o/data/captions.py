"""Captions: what is in a picture, said in one of eight ways; each caption accounts for exactly all of its objects.

Shape legend: N captions, L tokens, O = 3 object slots in the order of mention ("a square with a circle above it" says
where the circle is: the circle is object 0).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from blip3o.data.scenes import KINDS, MAX_OBJECTS, Scenes, choose, sample, uniform
from blip3o.data.words import (
    COLOR_IDS,
    COLUMN_IDS,
    NUMBER_IDS,
    PAD,
    PLURAL_IDS,
    ROW_IDS,
    SHAPE_IDS,
    SIZE_IDS,
    TOKEN,
    compile_templates,
    decode,
    fill,
    literal,
    pick,
    split,
    squeeze,
)

# GenEval's six categories by its own names, then two more
CAPTION_KINDS = (
    "single_object", "two_object", "counting", "colors", "position", "color_attribution", "three", "full",
)  # fmt: skip
SINGLE, TWO, COUNTING, COLORED, POSITION, ATTRIBUTE, THREE, FULL = range(8)
KIND_WEIGHTS = torch.tensor([0.8, 1.0, 1.5, 1.0, 2.0, 1.5, 1.5, 0.8])
CATEGORIES = (*CAPTION_KINDS[:6], "held_out")
SPLITS = ("train", "tune", "report")

PREFIXES = (
    "", "a picture of", "an image of", "a drawing of", "a photo of", "draw", "please draw", "draw me", "paint",
    "please paint", "paint me", "show", "show me", "please show me", "make", "create", "generate", "render",
    "draw a picture of", "make an image of", "create a picture of", "generate an image of", "i want to see",
    "there is", "here is", "this is", "i see", "a scene with",
)  # fmt: skip
_A, _B, _C = (
    f"{{art{o}}} {{size{o}}} {{color{o}}} {{shape{o}}} {{at{o}}} {{the{o}}} {{row{o}}} {{column{o}}}" for o in range(3)
)
_FULL = [f"{{art{o}}} {{size{o}}} {{color{o}}} {{shape{o}}} {{row{o}}} {{column{o}}}" for o in range(3)]
_NEAR, _TO, _ITS = "{near0} {near1}", "{to0} {to1} {to2} {to3}", "{its0} {its1} {its2}"
BODIES = (
    (_A, _A),
    (f"{_A} and {_B}", f"{_A} and {_B}", f"{_A} with {_B}", f"{_A} , {_B}"),
    ("{number} {size0} {color0} {plural0}", "exactly {number} {size0} {color0} {plural0}"),
    (_A, _A),
    (f"{_A} {_NEAR} {_B}", f"{_A} {_NEAR} {_B}", f"{_A} {_TO} {_B}", f"{_B} with {_A} {_ITS}"),
    (f"{_A} and {_B}", f"{_A} and {_B}", f"{_A} with {_B}", f"{_A} , {_B}"),
    (f"{_A} , {_B} and {_C}", f"{_A} and {_B} and {_C}", f"{_A} , {_B} , {_C}"),
    (f"{_FULL[0]} {{comma1}} {_FULL[1]} {{comma2}} {_FULL[2]}",),
)  # fmt: skip
# a relation in three wordings: [relation, word]
NEAR_IDS = compile_templates(("left of", "right of", "above", "below"), {})
TO_IDS = compile_templates(("to the left of", "to the right of", "above", "below"), {})
ITS_IDS = compile_templates(("to its left", "to its right", "above it", "below it"), {})

_PER_OBJECT = ("art", "size", "color", "shape", "at", "the", "row", "column")
_SLOTS = [f"{name}{o}" for name in _PER_OBJECT for o in range(MAX_OBJECTS)]
_SLOTS += [f"{name}{k}" for name, n in (("near", 2), ("to", 4), ("its", 3)) for k in range(n)]
_SLOTS += ["number", "plural0", "comma1", "comma2"]
_SLOT = {name: number for number, name in enumerate(_SLOTS)}
_PREFIX = compile_templates(PREFIXES, {})
_PLURAL_PREFIX = torch.where(_PREFIX.eq(TOKEN["is"]), TOKEN["are"], _PREFIX)
_PLURAL_PREFIX = torch.where(_PREFIX.eq(TOKEN["this"]), TOKEN["these"], _PLURAL_PREFIX)
_BODY = compile_templates([body for kind in BODIES for body in kind], _SLOT)
_BODY_COUNT = torch.tensor([len(kind) for kind in BODIES])
_BODY_START = _BODY_COUNT.cumsum(0) - _BODY_COUNT
_DRAWS = 24
_STREAM = 16  # streams 16.. of the hash belong to captions, one per attempt


@dataclass(frozen=True)
class Captions:
    """Sentences with the constraints they put on a picture. -1: not stated (or no such object)."""

    ids: Tensor  # [N, L] int64, padded with PAD
    length: Tensor  # [N] int64
    kind: Tensor  # [N] int64, of CAPTION_KINDS
    count: Tensor  # [N] int64, the exact number of objects
    color: Tensor  # [N, O] int64
    shape: Tensor  # [N, O] int64
    size: Tensor  # [N, O] int64
    position: Tensor  # [N, O] int64: 0..3 a cell, 4..7 the top, bottom, left, right half
    relation: Tensor  # [N] int64 of RELATIONS: object 0 is ... object 1

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Captions:
        return Captions(*(getattr(self, field.name)[index] for field in fields(self)))

    def text(self) -> list[str]:
        return [decode(row) for row in self.ids]


def concatenate(parts: list[Captions]) -> Captions:
    """One batch from several, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([pad(part.ids, (0, width - part.ids.shape[1]), value=PAD) for part in parts])
    rest = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Captions)[1:])
    return Captions(ids, *rest)


def applicable(scenes: Scenes) -> Tensor:
    """Which kinds of caption can account for all objects of a picture: bool [N, 8]."""
    count, color, shape = scenes.count, scenes.color, scenes.shape
    pair = color * 4 + shape
    absent = shape < 0
    same_shape = ((shape == shape[:, :1]) | absent).all(1)
    differ = pair[:, 0] != pair[:, 1]
    distinct = differ & (pair[:, 0] != pair[:, 2]) & (pair[:, 1] != pair[:, 2])
    one, two, three = count == 1, count == 2, count == 3
    return torch.stack(
        [
            one, two & (shape[:, 0] != shape[:, 1]), (count > 1) & same_shape, one,
            two & differ, two & differ, three & distinct, torch.ones_like(one),
        ],
        dim=1,
    )  # fmt: skip


def _compose(scenes: Scenes, u: Tensor, kind: Tensor | None) -> tuple[Captions, Tensor]:
    """One caption per scene from its own random numbers u [N, _DRAWS], and its body before the prefix, with holes."""
    count = scenes.count
    if kind is None:
        kind = choose(applicable(scenes) * KIND_WEIGHTS, u[:, 0])
    is_kind = kind[:, None] == torch.arange(len(CAPTION_KINDS))
    full, counting, relating = is_kind[:, FULL], is_kind[:, COUNTING], is_kind[:, POSITION]

    # order of mention: any, but reading order in full captions
    order = torch.where(full[:, None], scenes.cell.float(), u[:, 1:4]).masked_fill(scenes.shape < 0, 9.0).argsort(1)
    color, shape, size, cell = (x.gather(1, order) for x in (scenes.color, scenes.shape, scenes.size, scenes.cell))
    present = shape >= 0

    # what is said
    same_color = ((color == color[:, :1]) | ~present).all(1)
    same_size = ((size == size[:, :1]) | ~present).all(1)
    colored = is_kind[:, COLORED] | relating | is_kind[:, ATTRIBUTE] | is_kind[:, THREE] | full
    colored = colored | (counting & same_color & (u[:, 4] < 0.7))
    few = is_kind[:, SINGLE] | is_kind[:, TWO] | is_kind[:, COLORED]
    sized = u[:, 5:8] < torch.where(few, 0.5, 0.25)[:, None]
    sized = torch.where(counting[:, None], (same_size & (u[:, 5] < 0.4))[:, None], sized | full[:, None])
    placed = (is_kind[:, SINGLE] | is_kind[:, COLORED]) & (u[:, 8] < 0.6) | full
    half = torch.where(u[:, 9] < 0.5, 4 + cell[:, 0] // 2, 6 + cell[:, 0] % 2)
    by_cell = full | (u[:, 10] < 0.6)
    position = torch.where(by_cell[:, None], cell, half[:, None])
    columns, rows = cell[:, 0] % 2 - cell[:, 1] % 2, cell[:, 0] // 2 - cell[:, 1] // 2
    sideways = (columns != 0) & ((rows == 0) | (u[:, 11] < 0.5))
    relation = torch.where(sideways, (columns > 0).long(), 2 + (rows > 0).long())
    relation = torch.where(relating, relation, -1)

    color = torch.where(present & colored[:, None], color, -1)
    size = torch.where(present & sized, size, -1)
    position = torch.where(present & placed[:, None], position, -1)

    # words
    prefix = _first_prefix(u)
    article = torch.where(few[:, None] & (u[:, 13:14] < 0.25), TOKEN["one"], TOKEN["a"])
    said = position >= 0
    values = torch.cat(
        [
            present * article, pick(SIZE_IDS, size), pick(COLOR_IDS, color), pick(SHAPE_IDS, shape),
            literal("at", said), literal("the", said), pick(ROW_IDS, position), pick(COLUMN_IDS, position),
            NEAR_IDS[relation], TO_IDS[relation], ITS_IDS[relation], NUMBER_IDS[count][:, None],
            PLURAL_IDS[shape[:, :1]], literal(",", present[:, 1:]),
        ],
        dim=1,
    )  # fmt: skip
    which = _BODY_START[kind] + (u[:, 14] * _BODY_COUNT[kind]).long()
    body = fill(_BODY[which], values)
    ids, length = _open(prefix, counting, body)
    return Captions(ids, length, kind, count, color, shape, size, position, relation), body


def _open(prefix: Tensor, plural: Tensor, body: Tensor) -> tuple[Tensor, Tensor]:
    """Put a prefix [N] (of PREFIXES) before a body [N, T] with holes -> ids [N, L], length [N]."""
    opening = torch.where(plural[:, None], _PLURAL_PREFIX[prefix], _PREFIX[prefix])
    ids, length = squeeze(torch.cat([opening, body], dim=1))
    return ids, length


def captions(
    scenes: Scenes, seed: int, index: Tensor, *, kind: Tensor | int | None = None, train_only: bool = True
) -> Captions:
    """One caption per scene, a pure function of (scene, seed, index[i]).

    index: int64 [N], the sample numbers; kind: of CAPTION_KINDS (must apply to the scene), None draws one that does;
    train_only: a caption that `split` does not put into train is begun in another way (the next of PREFIXES) until it
    does. Raises ValueError for an index of another shape and when a kind does not apply to its scene.
    """
    n = len(scenes)
    if index.shape != (n,):
        raise ValueError(f"index must have shape [{n}], one per scene, got {list(index.shape)}")
    if isinstance(kind, int):
        kind = torch.full((n,), kind)
    if kind is not None and n and not bool(applicable(scenes).gather(1, kind[:, None]).all()):
        raise ValueError("kind must apply to its scene (captions.applicable says which do)")
    u = uniform(seed, _STREAM, index, _DRAWS)
    said, body = _compose(scenes, u, kind)
    if not train_only:
        return said
    ids, length, first = said.ids, said.length, _first_prefix(u)
    missing = (split(ids) != 0).nonzero()[:, 0]
    for tried in (range(1, 7), range(7, len(PREFIXES))):
        if len(missing) == 0:
            break
        tries, again = len(tried), missing.repeat_interleave(len(tried))
        prefix = (first[again] + torch.tensor(tried).repeat(len(missing))) % len(PREFIXES)
        more, more_length = _open(prefix, said.kind[again] == COUNTING, body[again])
        good = (split(more) == 0).view(-1, tries)
        best = torch.arange(len(missing)) * tries + good.int().argmax(1)
        width = max(ids.shape[1], more.shape[1])
        ids = pad(ids, (0, width - ids.shape[1]))
        ids[missing], length[missing] = pad(more, (0, width - more.shape[1]))[best], more_length[best]
        missing = missing[~good.any(1)]
    if len(missing):
        raise ValueError(f"seed must leave every scene a training caption, sample {index[missing[0]]} has none")
    return replace(said, ids=ids[:, : int(length.max()) if n else 0], length=length)


def _first_prefix(u: Tensor) -> Tensor:
    return (u[:, 12] * len(PREFIXES)).long()


_SCENE_KIND = ("one", "two", "count", "one", "relation", "relation")  # what a category's prompts are about


def prompts(category: str, part: int, n: int, seed: int = 0) -> Captions:
    """`n` different evaluation prompts of one of CATEGORIES, of one part of `split` (1 tune, 2 report; 0 train).

    "held_out": every object is a held-out pair, in turn a colors, counting, position and color_attribution prompt; the
    other categories hold no held-out pair. Raises ValueError for an unknown category or when there are too few.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {CATEGORIES}, got {category!r}")
    if part not in (0, 1, 2):
        raise ValueError(f"part must be 0 (train), 1 (tune) or 2 (report), got {part!r}")
    held = category == "held_out"
    kinds = torch.tensor([COLORED, COUNTING, POSITION, ATTRIBUTE] if held else [CAPTION_KINDS.index(category)])
    scene_kinds = torch.tensor([KINDS.index(_SCENE_KIND[kind]) for kind in kinds.tolist()])
    seen: set[tuple[int, ...]] = set()
    kept: list[Captions] = []
    size = min(max(4096, 8 * n), 1 << 16)
    for start in range(0, 40 * size, size):
        index = torch.arange(start, start + size)
        which = index % len(kinds)
        scenes = sample(seed + 7_919, index, kind=scene_kinds[which], held_out="only" if held else "exclude")
        drawn, _ = _compose(scenes, uniform(seed + 7_919, _STREAM + 100 + part, index, _DRAWS), kinds[which])
        new = []
        usable = split(drawn.ids) == part
        if category == "color_attribution":
            usable &= (drawn.color[:, 0] != drawn.color[:, 1]) & (drawn.shape[:, 0] != drawn.shape[:, 1])
        if held:
            usable &= ((drawn.color >= 0) | (drawn.shape < 0)).all(1)
        for row in usable.nonzero()[:, 0].tolist():
            key = tuple(drawn.ids[row, : drawn.length[row]].tolist())
            if key not in seen and len(seen) < n:
                seen.add(key)
                new.append(row)
        kept.append(drawn[torch.tensor(new, dtype=torch.int64)])
        if len(seen) == n:
            return concatenate(kept)
        if not new:
            break
    raise ValueError(f"n must be at most {len(seen)} for category {category!r} of part {SPLITS[part]!r}, got {n}")
