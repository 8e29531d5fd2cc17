"""An endless, seeded world of small pictures: what is in them, and how they are drawn.

A picture is 32 x 32, near white, and holds one to three objects, at most one in each quadrant (cell) of 16 pixels.
Sample i is a pure function of (seed, i): no state, no order, no batch size enters.

Shape legend: N pictures, O = 3 object slots (absent objects hold -1), M objects, S picture size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
CELLS = ("top left", "top right", "bottom left", "bottom right")  # cell = 2 * row + column
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("one", "two", "count", "relation", "three")
KIND_WEIGHTS = (0.18, 0.14, 0.22, 0.24, 0.22)
HELD_OUT = (("red", "triangle"), ("blue", "square"), ("blue", "circle"), ("yellow", "cross"))
PICTURE_SIZE = 32
CELL_SIZE = 16
MAX_OBJECTS = 3

COLOR_RGB = torch.tensor(
    [
        [0.86, 0.10, 0.12],
        [0.10, 0.60, 0.16],
        [0.12, 0.22, 0.86],
        [0.96, 0.80, 0.08],
        [0.58, 0.14, 0.68],
        [0.12, 0.78, 0.88],
    ]
)
BACKGROUND_RGB = torch.tensor([0.96, 0.96, 0.96])
# A colour has no name if it is further than this, in RGB, from every named one at 0.75 to 1.25 times its strength (the
# judge takes 0.25 and 0.75 for the same), and twice as far from the background.
UNNAMED_DISTANCE = 0.25
RADIUS_RANGE = torch.tensor([[3.7, 4.3], [6.0, 6.5]])  # per size, pixels
EXTENT = torch.tensor([1.0, 0.9, 1.12, 1.12])  # half the side of the bounding box, per shape, in radii
CROSS_ARM = 0.36  # half the width of an arm of the cross, in radii
JITTER = 2.0  # the centre of an object is at most this far from the centre of its cell, per axis


def _unnamed_rgb(levels: int = 9) -> Tensor:
    """RGB of the colours that have no name: [U, 3], from a grid of `levels` a channel."""
    level = torch.linspace(0, 1, levels)
    offset = torch.cartesian_prod(level, level, level) - BACKGROUND_RGB  # [levels^3, 3]
    tint = COLOR_RGB - BACKGROUND_RGB  # [6, 3]
    strength = (offset @ tint.T / tint.square().sum(-1)).clamp(0.75, 1.25)
    from_named = (offset[:, None] - strength[..., None] * tint).norm(dim=-1).amin(1)
    far = (from_named > UNNAMED_DISTANCE) & (offset.norm(dim=-1) > 2 * UNNAMED_DISTANCE)
    return offset[far] + BACKGROUND_RGB


PALETTE_RGB = torch.cat([COLOR_RGB, _unnamed_rgb()])  # what the colours of a scene index: the named ones first

PAIR_HELD_OUT = torch.zeros(len(COLORS), len(SHAPES), dtype=torch.bool)
for _color, _shape in HELD_OUT:
    PAIR_HELD_OUT[COLORS.index(_color), SHAPES.index(_shape)] = True


# --- counter-based randomness -----------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1
GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The low 64 bits of an integer as a signed one, which is what int64 tensors hold."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection of 64-bit integers. x int64 of any shape -> int64."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * signed(_MUL1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * signed(_MUL2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed: int, stream: int, index: Tensor, draws: int) -> Tensor:
    """Numbers in [0, 1): row i depends on (seed, stream, index[i]) alone. index int64 [N] -> float32 [N, draws]."""
    key = int(mix64(torch.tensor(signed(seed * GOLDEN + (stream + 1) * _MUL2))))
    row = mix64(index * signed(GOLDEN) + key)
    column = torch.arange(1, draws + 1, device=index.device) * signed(_MUL1)
    bits = mix64(row[:, None] + column)
    return ((bits >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def choose(weights: Tensor, u: Tensor) -> Tensor:
    """A random column of each row, in proportion to its weight. weights [N, K] >= 0, u [N] in [0, 1) -> int64 [N]."""
    total = weights.cumsum(1)
    return (total <= (u * total[:, -1])[:, None]).sum(1).clamp(max=weights.shape[1] - 1)


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """A batch of pictures as facts. Absent objects hold -1 (center and radius too) and come last."""

    count: Tensor  # [N] int64, 1..3
    color: Tensor  # [N, O] int64, of COLORS; from len(COLORS) on it has no name (PALETTE_RGB)
    shape: Tensor  # [N, O] int64
    size: Tensor  # [N, O] int64
    cell: Tensor  # [N, O] int64, 2 * row + column
    center: Tensor  # [N, O, 2] float32, (x, y) in pixels from the top left corner
    radius: Tensor  # [N, O] float32, pixels

    def __len__(self) -> int:
        return self.count.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))


def allowed_pairs(held_out: str) -> Tensor:
    """Which (colour, shape) pairs may be drawn: bool [6, 4]. held_out: "exclude" (training), "only" or "any"."""
    if held_out == "exclude":
        return ~PAIR_HELD_OUT
    if held_out == "only":
        return PAIR_HELD_OUT
    if held_out == "any":
        return torch.ones_like(PAIR_HELD_OUT)
    raise ValueError(f'held_out must be "exclude", "only" or "any", got {held_out!r}')


def sample_unnamed(seed: int, index: Tensor) -> Scenes:
    """Scenes as `sample` draws them, of any shapes, in which no object's colour has a name: int64 [N] -> N scenes.

    They show what colours and shapes are without showing a (colour, shape) pair: none can be told in words, and the
    held-out pairs are not among them. An object's colour is any of the unnamed ones.
    """
    scenes = sample(seed, index, held_out="any")
    unnamed = len(PALETTE_RGB) - len(COLORS)
    color = len(COLORS) + (uniform(seed, 1, index, MAX_OBJECTS) * unnamed).long()
    return replace(scenes, color=torch.where(scenes.color < 0, -1, color))


def sample(seed: int, index: Tensor, *, kind: Tensor | int | None = None, held_out: str = "exclude") -> Scenes:
    """Draw one scene for each index.

    seed: any integer; index: int64 [N]; kind: which of KINDS, int or int64 [N] (None draws it by KIND_WEIGHTS):
    one object; two of different shapes; two or three of one shape (half the time of one colour); two different
    (colour, shape) pairs; three different pairs. held_out: "exclude" never draws a held-out pair, "only" draws
    nothing else, "any" knows no difference. Raises ValueError for an index that is not int64 [N] or an unknown kind.
    """
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 of shape [N], got {index.dtype} of shape {list(index.shape)}")
    allowed = allowed_pairs(held_out)
    n, num_shapes = index.shape[0], len(SHAPES)
    u = uniform(seed, 0, index, 24 + 24)
    if kind is None:
        edges = torch.tensor(KIND_WEIGHTS).cumsum(0)[:-1]
        kind = torch.bucketize(u[:, 0].contiguous(), edges, right=True)
    elif isinstance(kind, int):
        kind = torch.full((n,), kind)
    if n and not (int(kind.min()) >= 0 and int(kind.max()) < len(KINDS)):
        raise ValueError(f"kind must be 0..{len(KINDS) - 1} (one of {KINDS}), got {kind.min()}..{kind.max()}")

    # (colour, shape) pairs: random keys, the largest win; an object's pair excludes some pairs for the next ones
    keys = torch.where(allowed.flatten(), u[:, 24:], -1.0)
    top = keys.topk(MAX_OBJECTS, dim=1).indices
    first = top[:, :1]
    pair_shape = torch.arange(allowed.numel()) % num_shapes
    same_shape = pair_shape == first % num_shapes
    other = torch.where(same_shape, -1.0, keys).argmax(1, keepdim=True)
    alike = torch.where(same_shape, keys, -1.0).topk(MAX_OBJECTS, dim=1).indices
    one_color = (u[:, 1:2] < 0.5) | (not bool((allowed.sum(0) >= MAX_OBJECTS).all()))
    counting = torch.where(one_color, first, alike)
    pair = torch.where((kind == 2)[:, None], counting, top)
    pair = torch.where((kind == 1)[:, None], torch.cat([first, other, other], 1), pair)

    many = 2 + (u[:, 2] < 0.5).long()
    count = torch.tensor([1, 2, 0, 2, 3])[kind]
    count = torch.where(kind == 2, many, count)
    present = torch.arange(MAX_OBJECTS) < count[:, None]
    size = (u[:, 3:6] < 0.5).long()
    size = torch.where(((kind == 2) & (u[:, 6] < 0.5))[:, None], size[:, :1], size)
    cell = u[:, 7:11].argsort(dim=1)[:, :MAX_OBJECTS]
    shape, color = pair % num_shapes, pair // num_shapes

    low, high = RADIUS_RANGE[size].unbind(-1)
    radius = low + (high - low) * u[:, 11:14]
    room = (CELL_SIZE / 2 - 0.1 - EXTENT[shape] * radius).clamp(max=JITTER)
    corner = torch.stack([cell % 2, cell // 2], dim=-1) * float(CELL_SIZE) + CELL_SIZE / 2
    center = corner + (2 * u[:, 14:20].reshape(n, MAX_OBJECTS, 2) - 1) * room[..., None]
    absent = ~present
    return Scenes(
        count=count,
        color=color.masked_fill(absent, -1),
        shape=shape.masked_fill(absent, -1),
        size=size.masked_fill(absent, -1),
        cell=cell.masked_fill(absent, -1),
        center=center.masked_fill(absent[..., None], -1.0),
        radius=radius.masked_fill(absent, -1.0),
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def _distance(shape: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance (negative inside, exact along the edges) to a shape of radius r [M,1,1] at the origin."""
    if shape == 0:
        return (x.square() + y.square()).sqrt_().sub_(r)
    extent = r * float(EXTENT[shape])
    if shape == 1:
        return torch.maximum(x.abs(), y.abs()).sub_(extent)
    if shape == 2:  # apex at the top, base at the bottom, as wide as it is high
        edge = ((2 * x.abs() - y) - extent).mul_(5.0**-0.5)
        return torch.maximum(torch.maximum(edge, x.abs() - extent), y.abs() - extent)
    ax, ay, arm = x.abs(), y.abs(), r * CROSS_ARM
    upright = torch.maximum(ax - arm, ay - extent)
    return torch.minimum(upright, torch.maximum(ax - extent, ay - arm))


def coverage(shape: Tensor, center: Tensor, radius: Tensor, size: int = PICTURE_SIZE) -> Tensor:
    """Anti-aliased masks, clamp(1/2 - signed distance, 0, 1) at the pixel centres.

    shape int64 [M] (0..3), center float [M, 2] (x, y) and radius float [M] in pixels -> float32 [M, size, size].
    """
    if center.shape != (*shape.shape, 2) or radius.shape != shape.shape or shape.ndim != 1:
        raise ValueError(
            "shape, center and radius must be [M], [M, 2] and [M], got "
            f"{list(shape.shape)}, {list(center.shape)} and {list(radius.shape)}"
        )
    grid = torch.arange(size, dtype=torch.float32, device=center.device) + 0.5
    out = center.new_empty((shape.shape[0], size, size), dtype=torch.float32)
    for which in range(len(SHAPES)):
        rows = (shape == which).nonzero()[:, 0]
        if len(rows):
            x = grid - center[rows, 0, None, None]
            y = grid[:, None] - center[rows, 1, None, None]
            out[rows] = (0.5 - _distance(which, x, y, radius[rows, None, None])).clamp_(0.0, 1.0)
    return out


def render(scenes: Scenes) -> Tensor:
    """Draw a batch: float32 [N, 3, 32, 32] in [0, 1], rows from top to bottom, RGB."""
    n, side = len(scenes), PICTURE_SIZE // CELL_SIZE
    where, slot = (scenes.shape >= 0).nonzero(as_tuple=True)
    cell = scenes.cell[where, slot]
    corner = torch.stack([cell % side, cell // side], dim=-1) * float(CELL_SIZE)
    mask = coverage(
        scenes.shape[where, slot], scenes.center[where, slot] - corner, scenes.radius[where, slot], CELL_SIZE
    )
    tint = PALETTE_RGB[scenes.color[where, slot]] - BACKGROUND_RGB
    patch = BACKGROUND_RGB[:, None, None] + tint[:, :, None, None] * mask[:, None]
    canvas = BACKGROUND_RGB[:, None, None].repeat(n * side * side, 1, CELL_SIZE, CELL_SIZE)
    canvas[where * side * side + cell] = patch
    canvas = canvas.view(n, side, side, 3, CELL_SIZE, CELL_SIZE).permute(0, 3, 1, 4, 2, 5)
    return canvas.reshape(n, 3, PICTURE_SIZE, PICTURE_SIZE)
