"""A judge that reads pixels: what is in a picture, and whether it is exactly what was asked for.

It is made of rules, knows how the world is drawn (``blip3o.data.scenes``) and nothing of how a picture came about:

1. each pixel is un-mixed into background and one palette colour, p = background + alpha (colour - background), the
   colour with the smallest residual; a pixel where that is too large is a leftover;
2. pixels of one colour with alpha >= 1/2 that touch form a component; tiny components and haze (a fainter tint that
   borders no component) are leftovers too;
3. a component's mass and centroid give, for each shape, the radius and the centre it would have; the shape whose
   template (``scenes.coverage``, sharp or softened) has the largest soft intersection over union is the answer,
   provided that this is large and the next shape's not close;
4. a picture with an unclear component, an impossible radius, too many components or leftovers is not clear: it fails
   whatever was asked.

Objects of one colour may touch along the lines between the cells. A picture that is not clear is therefore read once
more with its components cut along those lines.

Shape legend: N pictures, S = 32 pixels, C = 6 colours, K = MAX_DETECTED objects of a picture,
O = 3 asked objects, M components of a batch, F = 4 shapes, P = 6 orders of three objects.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from blip3o.data.captions import Captions
from blip3o.data.scenes import (
    BACKGROUND_RGB,
    CELL_SIZE,
    COLOR_RGB,
    COLORS,
    MAX_OBJECTS,
    PICTURE_SIZE,
    RADIUS_RANGE,
    SHAPES,
    coverage,
)

MAX_DETECTED = 4
MAX_RESIDUAL = 0.25  # distance in RGB from the line between background and colour; the closest colours are 0.5 apart
CORE_ALPHA = 0.5  # a pixel covered at least this much belongs to a component
HAZE_ALPHA = 0.2  # a pixel tinted at least this much is a leftover unless it borders a component
MIN_AREA = 12  # pixels; smaller components are leftovers; the smallest object covers 34
MAX_LEFTOVER = 6  # pixels
BLURS = (0.0, 0.5, 0.8)  # standard deviations in pixels of the templates tried: a decoder's edges are soft
MIN_TINT = 0.75  # of the colour's full strength, in the strongest pixels of an object
MIN_IOU = 0.85
MIN_MARGIN = 0.04  # of the best shape's intersection over union before the next one's
SIZE_THRESHOLD = float(RADIUS_RANGE[0, 1] + RADIUS_RANGE[1, 0]) / 2
RADIUS_LIMITS = (float(RADIUS_RANGE[0, 0]) - 0.7, float(RADIUS_RANGE[1, 1]) + 0.7)
POSITION_MARGIN = 2.0  # pixels a centre must be away from the line between two cells to be in one of them
RELATION_MARGIN = 8.0  # pixels between the centres
CHUNK = 256  # pictures at a time: what fits the cache

_ORDERS = torch.tensor(list(itertools.permutations(range(MAX_OBJECTS))))  # [P, O]: which detected object is asked o


@dataclass(frozen=True)
class Detections:
    """What was read. Absent objects hold -1 and come last; a picture that is not clear holds none."""

    clear: Tensor  # [N] bool
    count: Tensor  # [N] int64, 0..K
    color: Tensor  # [N, K] int64, of COLORS
    shape: Tensor  # [N, K] int64, of SHAPES
    size: Tensor  # [N, K] int64, of SIZES
    center: Tensor  # [N, K, 2] float32, (x, y) in pixels from the top left corner
    radius: Tensor  # [N, K] float32, pixels

    def __len__(self) -> int:
        return self.clear.shape[0]


def detect(pictures: Tensor) -> Detections:
    """Reads pictures float [N, 3, 32, 32], RGB in [0, 1] (values outside are clamped; NaN makes a picture not clear).

    The reading is done on the CPU in float32 whatever the pictures' device, so that scores do not depend on it.

    Raises ValueError for another shape or dtype.
    """
    expected = (3, PICTURE_SIZE, PICTURE_SIZE)
    if pictures.dim() != 4 or tuple(pictures.shape[1:]) != expected or not pictures.is_floating_point():
        raise ValueError(f"pictures: expected float [N, 3, 32, 32], got {pictures.dtype} {list(pictures.shape)}")
    chunks = [_read_chunk(chunk) for chunk in torch.split(pictures.detach().to("cpu", torch.float32), CHUNK)]
    return _concatenate(chunks)


def judge(pictures: Tensor, asked: Captions) -> Tensor:
    """Whether each picture shows exactly what its caption asks for: bool [N].

    A picture is right if it is clear, holds exactly ``asked.count`` objects, and some one-to-one assignment of detected
    to asked objects agrees with every stated colour, shape, size and position and with the relation. pictures float
    [N, 3, 32, 32]; asked holds N captions. Raises ValueError for other shapes.
    """
    if len(asked) != len(pictures):
        raise ValueError(f"asked: expected {len(pictures)} captions, one per picture, got {len(asked)}")
    return agree(detect(pictures), asked)


def agree(found: Detections, asked: Captions) -> Tensor:
    """Whether what was found is exactly what is asked for: bool [N]. See ``judge``."""
    present = torch.arange(MAX_OBJECTS) < asked.count[:, None]  # [N, O]
    center = found.center[:, :MAX_OBJECTS]
    fits = present[:, :, None] == present[:, None, :]  # [N, detected, asked]
    for seen, stated in ((found.color, asked.color), (found.shape, asked.shape), (found.size, asked.size)):
        fits &= (stated[:, None, :] < 0) | (seen[:, :MAX_OBJECTS, None] == stated[:, None, :])
    inside = _inside(center).gather(2, asked.position.clamp(min=0)[:, None, :].expand(-1, MAX_OBJECTS, -1))
    fits &= (asked.position[:, None, :] < 0) | inside

    assigned = fits[:, _ORDERS, torch.arange(MAX_OBJECTS)].all(2)  # [N, P]
    offset = center[:, _ORDERS[:, 0]] - center[:, _ORDERS[:, 1]]  # [N, P, 2]
    sides = torch.stack([-offset[..., 0], offset[..., 0], -offset[..., 1], offset[..., 1]], dim=2) > RELATION_MARGIN
    stated = asked.relation[:, None, None]
    related = (stated < 0) | sides.gather(2, stated.clamp(min=0).expand(-1, len(_ORDERS), 1))
    return found.clear & (found.count == asked.count) & (assigned & related[..., 0]).any(1)


def _inside(center: Tensor) -> Tensor:
    """Centres [N, K, 2] -> bool [N, K, 8]: in each cell, in the top, bottom, left and right half."""
    offset = center - PICTURE_SIZE / 2
    left, top = (offset < -POSITION_MARGIN).unbind(-1)
    right, bottom = (offset > POSITION_MARGIN).unbind(-1)
    cells = [top & left, top & right, bottom & left, bottom & right]
    return torch.stack([*cells, top, bottom, left, right], dim=-1)


# --- reading ----------------------------------------------------------------------------------------------------------


def _moments() -> tuple[Tensor, Tensor]:
    """Per shape of radius 1: area [F] and centroid seen from the centre [F, 2], measured on a large drawing."""
    side, radius = 256, 100.0
    number = len(SHAPES)
    mask = coverage(torch.arange(number), torch.full((number, 2), side / 2), torch.full((number,), radius), side)
    area, centroid = _mass(mask)
    return area / radius**2, (centroid - side / 2) / radius


def _mass(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Soft masks [M, S, S] -> mass [M] and centroid (x, y) [M, 2]."""
    place = torch.arange(mask.shape[-1], dtype=mask.dtype) + 0.5
    mass = mask.sum((1, 2))
    centroid = torch.stack([mask.sum(1) @ place, mask.sum(2) @ place], dim=1) / mass.clamp(min=1e-6)[:, None]
    return mass, centroid


_AREA, _CENTROID = _moments()


@dataclass(frozen=True)
class _Pixels:
    alpha: Tensor  # [N, C, S, S] float32, how much of each colour a pixel would hold
    color: Tensor  # [N, S, S] int64, the colour that explains a pixel best
    core: Tensor  # [N, S, S] bool, pixels that belong to a component
    beside: Tensor  # [N, S, S] bool, those and their neighbours
    leftover: Tensor  # [N] int64, pixels that no palette colour explains, and haze

    def __getitem__(self, index: Tensor) -> _Pixels:
        return _Pixels(self.alpha[index], self.color[index], self.core[index], self.beside[index], self.leftover[index])


def _read_chunk(pictures: Tensor) -> Detections:
    """At most two readings of pictures [N, 3, S, S]; what cannot become clear by a second one is not read again."""
    finite = pictures.isfinite().flatten(1).all(1)
    pixels = _unmix(pictures.nan_to_num(0.0).clamp(0.0, 1.0))
    found = _nothing(len(pictures))
    rows = (finite & (pixels.leftover <= MAX_LEFTOVER)).nonzero()[:, 0]
    for cut in (False, True):
        reading, again = _read(pixels[rows], cut)
        for all_pictures, these in zip(_tensors(found), _tensors(reading), strict=True):
            all_pictures[rows] = these
        rows = rows[again]
    return found


def _read(pixels: _Pixels, cut: bool) -> tuple[Detections, Tensor]:
    """One reading, and which pictures are not clear only because a component has no clear shape: bool [N]."""
    colors = torch.arange(len(COLORS))[:, None, None]
    identity = _components(pixels.core[:, None] & (pixels.color[:, None] == colors), cut)
    picture, color, number, area = _list_components(identity)
    large = area >= MIN_AREA
    leftover = pixels.leftover.index_add(0, picture[~large], area[~large])
    picture, color, number = picture[large], color[large], number[large]
    count = torch.bincount(picture, minlength=len(leftover))
    few = (leftover <= MAX_LEFTOVER) & (count <= MAX_DETECTED)
    picture, color, number = (x[few[picture]] for x in (picture, color, number))

    mask = identity[picture, color] == number[:, None, None]
    ring = _grow(mask.float())
    near = mask | ((ring > 0.0) & ~pixels.core[picture]) | ((_grow(ring) > 0.0) & ~pixels.beside[picture])
    sure, shape, center, radius = _recognise(pixels.alpha[picture, color] * near)
    clear = few.clone()
    clear[picture[~sure]] = False
    return _gather(clear, picture, color, shape, center, radius), few & ~clear


def _unmix(pictures: Tensor) -> _Pixels:
    """Pictures [N, 3, S, S] in [0, 1] -> what each pixel holds."""
    tint = COLOR_RGB - BACKGROUND_RGB
    offset = pictures - BACKGROUND_RGB[:, None, None]
    along = torch.einsum("cr,nrhw->nchw", tint, offset)
    norm = tint.square().sum(1)[:, None, None]
    alpha = (along / norm).clamp(0.0, 1.0)
    residual, color = (offset.square().sum(1, keepdim=True) - 2 * alpha * along + alpha.square() * norm).min(1)
    strength = alpha.gather(1, color[:, None])[:, 0]
    unclear = residual > MAX_RESIDUAL**2
    core = (strength >= CORE_ALPHA) & ~unclear
    beside = _grow((core | unclear).float()) > 0.0
    leftover = unclear | ((strength >= HAZE_ALPHA) & ~beside)
    return _Pixels(alpha, color, core, beside, leftover.flatten(1).sum(1))


def _grow(image: Tensor) -> Tensor:
    """Maximum over 3 x 3 neighbourhoods of images [.., H, W] with values >= 0."""
    wide = functional.pad(image, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(wide[..., :-2], wide[..., 2:]), wide[..., 1:-1])
    return torch.maximum(torch.maximum(rows[..., :-2, :], rows[..., 2:, :]), rows[..., 1:-1, :])


def _components(mask: Tensor, cut: bool) -> Tensor:
    """Masks [N, C, S, S] -> the number of the component of each pixel, float32: the largest pixel number 1..S^2 in it,
    0 outside. cut: components end at the lines between the cells."""
    side = PICTURE_SIZE // CELL_SIZE
    number = torch.arange(1.0, PICTURE_SIZE**2 + 1).view(PICTURE_SIZE, PICTURE_SIZE)
    identity = number * mask
    allowed = mask.float()
    if cut:
        split = (*mask.shape[:2], side, CELL_SIZE, side, CELL_SIZE)
        identity, allowed = (x.view(split).transpose(3, 4).contiguous() for x in (identity, allowed))
    for step in range(PICTURE_SIZE):
        spread = _grow(identity) * allowed
        if step % 4 == 3 and torch.equal(spread, identity):
            break
        identity = spread
    return identity.transpose(3, 4).reshape(mask.shape) if cut else identity


def _list_components(identity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Component numbers [N, C, S, S] -> per component its picture, colour, number and area: [M] each, by picture."""
    n, classes = identity.shape[:2]
    pixels = PICTURE_SIZE**2 + 1
    row = torch.arange(n * classes).view(n, classes, 1, 1) * pixels
    areas = torch.bincount((identity.long() + row).flatten(), minlength=n * classes * pixels).view(n, classes, pixels)
    areas[:, :, 0] = 0
    picture, color, number = areas.nonzero(as_tuple=True)
    return picture, color, number, areas[picture, color, number]


def _recognise(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft masks [M, S, S] -> whether sure [M], shape [M], centre [M, 2], radius [M]."""
    m, number = len(mask), len(SHAPES)
    tint = mask.pow(9).sum((1, 2)) / mask.pow(8).sum((1, 2)).clamp(min=1e-6)
    mask = (mask / tint[:, None, None].clamp(min=1e-6)).clamp(max=1.0)
    mass, centroid = _mass(mask)
    radius = (mass[:, None] / _AREA).sqrt()  # [M, F]
    center = centroid[:, None] - radius[..., None] * _CENTROID  # [M, F, 2]
    shapes = torch.arange(number).repeat(m)
    sharp = coverage(shapes, center.flatten(0, 1), radius.flatten()).view(m, number, *mask.shape[1:])
    overlap = torch.zeros_like(radius)
    for blur in BLURS:
        template = _soften(sharp, blur) if blur > 0.0 else sharp
        both = torch.minimum(template, mask[:, None]).sum((2, 3))
        union = (template.sum((2, 3)) + mass[:, None] - both).clamp(min=1e-6)
        overlap = torch.maximum(overlap, both / union)
    (first, second), shape = overlap.topk(2, dim=1).values.unbind(1), overlap.argmax(1)
    rows = torch.arange(m)
    center, radius = center[rows, shape], radius[rows, shape]
    low, high = RADIUS_LIMITS
    sure = (tint >= MIN_TINT) & (first >= MIN_IOU) & (first - second >= MIN_MARGIN)
    sure &= (radius >= low) & (radius <= high)
    return sure, shape, center, radius


def _soften(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of images [.., S, S]."""
    place = torch.arange(image.shape[-1], dtype=image.dtype)
    kernel = torch.softmax((place[:, None] - place).square() / (-2.0 * deviation**2), dim=1)
    return kernel @ image @ kernel.T


def _nothing(n: int) -> Detections:
    """n pictures that are not clear."""
    slots = (n, MAX_DETECTED)
    return Detections(
        clear=torch.zeros(n, dtype=torch.bool),
        count=torch.zeros(n, dtype=torch.int64),
        color=torch.full(slots, -1),
        shape=torch.full(slots, -1),
        size=torch.full(slots, -1),
        center=torch.full((*slots, 2), -1.0),
        radius=torch.full(slots, -1.0),
    )


def _gather(clear: Tensor, picture: Tensor, color: Tensor, shape: Tensor, center: Tensor, radius: Tensor) -> Detections:
    """Components, sorted by picture, put into the slots of their pictures; a picture that is not clear gets none."""
    kept = clear[picture]
    picture, color, shape, center, radius = (x[kept] for x in (picture, color, shape, center, radius))
    found = _nothing(len(clear))
    found.clear[:] = clear
    found.count[:] = torch.bincount(picture, minlength=len(clear))
    slot = torch.arange(len(picture)) - (found.count.cumsum(0) - found.count)[picture]
    found.color[picture, slot] = color
    found.shape[picture, slot] = shape
    found.size[picture, slot] = (radius > SIZE_THRESHOLD).long()
    found.center[picture, slot] = center
    found.radius[picture, slot] = radius
    return found


def _tensors(found: Detections) -> tuple[Tensor, ...]:
    return (found.clear, found.count, found.color, found.shape, found.size, found.center, found.radius)


def _concatenate(parts: list[Detections]) -> Detections:
    columns = zip(*(_tensors(part) for part in parts), strict=True)
    clear, count, color, shape, size, center, radius = (torch.cat(column) for column in columns)
    return Detections(clear, count, color, shape, size, center, radius)
