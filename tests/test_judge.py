"""The judge accepts true pictures, rejects every single difference, and gives nothing to pictures of nothing.

Shape legend: N pictures, O = 3 object slots, K detected slots.
"""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from blip3o.data import scenes as world
from blip3o.data.captions import CAPTION_KINDS, Captions, captions, concatenate, prompts
from blip3o.data.scenes import CELLS, COLORS, RELATIONS, SHAPES, Scenes, render, sample, uniform
from blip3o.evaluate.judge import MAX_DETECTED, Detections, agree, detect, judge

REQUIRED = 0.995
SEED = 90_210


def true_pairs(n: int, kinds: tuple[str, ...], held_out: str = "any", seed: int = SEED) -> tuple[Scenes, Captions]:
    """n scenes with a caption of each kind in turn that holds for them."""
    scene_kind = {
        "single_object": 0,
        "two_object": 1,
        "counting": 2,
        "colors": 0,
        "position": 3,
        "color_attribution": 3,
    }
    number = torch.tensor([CAPTION_KINDS.index(kind) for kind in kinds]).repeat(-(-n // len(kinds)))[:n]
    fixed = torch.tensor([scene_kind.get(kind, 4) for kind in kinds]).repeat(-(-n // len(kinds)))[:n]
    scenes = sample(seed, torch.arange(n), kind=fixed, held_out=held_out)
    return scenes, captions(scenes, seed, torch.arange(n), kind=number, train_only=False)


def rows(scenes: Scenes, asked: Captions, keep: Tensor, n: int) -> tuple[Scenes, Captions]:
    """The first n scenes to keep."""
    index = keep.nonzero()[:n, 0]
    return scenes[index], asked[index]


def fitted(scenes: Scenes, **changes: Tensor) -> Scenes:
    """The scene with changes, every object moved as little as needed to stay within its cell."""
    scenes = replace(scenes, **changes)
    cell, present = scenes.cell.clamp(min=0), scenes.shape >= 0
    middle = torch.stack([cell % 2, cell // 2], dim=-1) * 16.0 + 8.0
    room = 7.9 - world.EXTENT[scenes.shape.clamp(min=0)] * scenes.radius
    room = room.clamp(max=world.JITTER)[..., None]
    center = torch.maximum(torch.minimum(scenes.center, middle + room), middle - room)
    return replace(scenes, center=torch.where(present[..., None], center, scenes.center))


def first(scenes: Scenes) -> Tensor:
    """One present object of each scene, in turn the first, second or third: int64 [N, 1]."""
    return (torch.arange(len(scenes)) % scenes.count)[:, None]


def put(values: Tensor, slot: Tensor, value: Tensor) -> Tensor:
    """values [N, O] with value [N, 1] at slot [N, 1]."""
    return values.scatter(1, slot, value)


def stated(field: Tensor, scenes: Scenes) -> Tensor:
    """Whether a caption field [N, O] is stated for all objects: bool [N]."""
    return (field >= 0).sum(1) == scenes.count


# each changes one thing that the caption states; returns the altered scenes and their (now false) captions


def other_color(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(2 * n, ("colors", "counting", "position", "color_attribution", "three", "full"))
    scenes, asked = rows(scenes, asked, stated(asked.color, scenes), n)
    slot, shift = first(scenes), 1 + torch.arange(len(scenes))[:, None] % (len(COLORS) - 1)
    return replace(scenes, color=put(scenes.color, slot, (scenes.color.gather(1, slot) + shift) % len(COLORS))), asked


def other_shape(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(n, CAPTION_KINDS)
    slot, shift = first(scenes), 1 + torch.arange(n)[:, None] // len(CAPTION_KINDS) % (len(SHAPES) - 1)
    return fitted(scenes, shape=put(scenes.shape, slot, (scenes.shape.gather(1, slot) + shift) % len(SHAPES))), asked


def other_size(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(4 * n, ("single_object", "colors", "counting", "full"))
    scenes, asked = rows(scenes, asked, stated(asked.size, scenes), n)
    slot = first(scenes)
    size = 1 - scenes.size.gather(1, slot)
    low, high = world.RADIUS_RANGE[size].unbind(-1)
    radius = low + (high - low) * uniform(SEED, 9, torch.arange(len(scenes)), 1)
    return fitted(scenes, size=put(scenes.size, slot, size), radius=put(scenes.radius, slot, radius)), asked


def one_fewer(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(n, ("two_object", "counting", "position", "color_attribution", "three", "full"))
    last = (scenes.count - 1)[:, None]
    gone = torch.full_like(last, -1)
    center = scenes.center.scatter(1, last[..., None].expand(-1, -1, 2), -1.0)
    fields_ = {name: put(getattr(scenes, name), last, gone) for name in ("color", "shape", "size", "cell")}
    return replace(scenes, count=scenes.count - 1, center=center, **fields_), asked


def one_more(n: int) -> tuple[Scenes, Captions]:
    """A copy of an object, or (every second time) an object of its own, in a free cell."""
    scenes, asked = true_pairs(
        2 * n, ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
    )
    scenes, asked = rows(scenes, asked, scenes.count < 3, n)
    m = len(scenes)
    taken = (scenes.cell[:, :, None] == torch.arange(4)).any(1)
    slot, free = scenes.count[:, None], (~taken).int().argmax(1, keepdim=True)
    extra, own = sample(SEED + 1, torch.arange(m), kind=0), (torch.arange(m) % 2 == 0)[:, None]
    new = {
        name: torch.where(own, getattr(extra, name)[:, :1], getattr(scenes, name)[:, :1])
        for name in ("color", "shape", "size", "radius")
    }
    changes = {name: put(getattr(scenes, name), slot, value) for name, value in new.items()}
    return fitted(scenes, count=scenes.count + 1, cell=put(scenes.cell, slot, free), **changes), asked


def other_relation(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(n, ("position",))
    swap = torch.tensor([1, 0, 2])
    return fitted(scenes, cell=scenes.cell[:, swap], center=scenes.center[:, swap]), asked


def other_binding(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(2 * n, ("color_attribution", "position"))
    differ = (scenes.color[:, 0] != scenes.color[:, 1]) & (scenes.shape[:, 0] != scenes.shape[:, 1])
    scenes, asked = rows(scenes, asked, differ, n)
    return replace(scenes, color=scenes.color[:, torch.tensor([1, 0, 2])]), asked


def other_position(n: int) -> tuple[Scenes, Captions]:
    scenes, asked = true_pairs(2 * n, ("single_object", "colors"))
    scenes, asked = rows(scenes, asked, asked.position[:, 0] >= 0, n)
    said, cell = asked.position[:, :1], scenes.cell[:, :1]
    elsewhere = (cell + 1 + torch.arange(len(scenes))[:, None] % 3) % 4
    opposite = torch.where(said < 6, (cell + 2) % 4, cell // 2 * 2 + 1 - cell % 2)
    moved = torch.where(said < 4, elsewhere, opposite)
    return fitted(scenes, cell=put(scenes.cell, torch.zeros_like(cell), moved)), asked


DIFFERENCES: tuple[Callable[[int], tuple[Scenes, Captions]], ...] = (
    other_color, other_shape, other_size, one_fewer, one_more, other_relation, other_binding, other_position,
)  # fmt: skip


def soften(pictures: Tensor, deviation: float) -> Tensor:
    place = torch.arange(-4.0, 5.0)
    kernel = torch.softmax(place.square() / (-2 * deviation**2), 0)
    wide = functional.pad(pictures, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[:, None]
    rows_ = functional.conv2d(wide, kernel.view(1, 1, 1, 9))
    return functional.conv2d(rows_, kernel.view(1, 1, 9, 1)).view_as(pictures)


def psnr(one: Tensor, two: Tensor) -> float:
    return float(-10 * torch.log10((one - two).square().mean()))


def test_accepts_true_pictures() -> None:
    accepted, total = 0, 0
    for held_out, n in (("any", 2400), ("exclude", 800), ("only", 800)):
        kinds = CAPTION_KINDS if held_out != "only" else ("single_object", "counting", "colors", "position", "full")
        scenes, asked = true_pairs(n, kinds, held_out)
        right = judge(render(scenes), asked)
        assert float(right.float().mean()) >= REQUIRED, f"held_out={held_out}"
        accepted, total = accepted + int(right.sum()), total + n
    assert total == 4000 and accepted / total >= REQUIRED


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda f: f.__name__)
def test_rejects_one_difference(difference: Callable[[int], tuple[Scenes, Captions]]) -> None:
    """The altered pictures are read as clearly as true ones, and yet rejected."""
    scenes, asked = difference(1000)
    assert len(scenes) >= 990
    found = detect(render(scenes))
    assert float(found.clear.float().mean()) >= REQUIRED, "an altered picture must be rejected for the right reason"
    assert float((~agree(found, asked)).float().mean()) >= REQUIRED


def test_reads_the_facts() -> None:
    scenes = sample(SEED, torch.arange(1500), held_out="any")
    found = detect(render(scenes))
    assert bool((found.count == scenes.count).all()) and bool(found.clear.all())
    order = torch.where(
        found.shape >= 0, (found.center[..., 1] > 16).long() * 2 + (found.center[..., 0] > 16), 9
    ).argsort(1)
    truth = torch.where(scenes.shape >= 0, scenes.cell, 9).argsort(1)
    for name in ("color", "shape", "size"):
        assert torch.equal(getattr(found, name).gather(1, order)[:, :3], getattr(scenes, name).gather(1, truth)), name
    assert bool((found.shape[:, 3] == -1).all())
    assert float((found.radius.gather(1, order)[:, :3] - scenes.radius.gather(1, truth)).abs().max()) < 0.2
    x = [t.gather(1, o[..., None].expand(-1, -1, 2)) for t, o in ((found.center, order[:, :3]), (scenes.center, truth))]
    assert float((x[0] - x[1]).abs().max()) < 0.3


def test_reads_touching_objects_apart() -> None:
    """Neighbours pushed against the line between their cells, of one colour and of two, side by side and stacked."""
    n = 400
    scenes = sample(SEED, torch.arange(n), kind=world.KINDS.index("count"), held_out="any")
    index = torch.arange(n)
    pair = torch.tensor([[0, 1, -1], [0, 2, -1], [2, 3, -1], [1, 3, -1]])[index % 4]
    sideways = (index % 4 % 2 == 0)[:, None, None]
    towards = torch.where(sideways, torch.tensor([8.0, 0.0]), torch.tensor([0.0, 8.0]))
    towards = towards * torch.tensor([1.0, -1.0, 0.0])[:, None]
    cell = pair.clamp(min=0)
    middle = torch.stack([cell % 2, cell // 2], dim=-1) * 16.0 + 8.0
    present = torch.arange(3) < 2
    second = torch.where(index % 3 == 0, (scenes.color[:, 0] + 1) % len(COLORS), scenes.color[:, 0])
    color = torch.stack([scenes.color[:, 0], second, torch.full_like(second, -1)], dim=1)
    large = torch.where(present, 6.4, -1.0).expand(n, 3)
    size = torch.where(present, 1, -1).expand(n, 3)
    shape = torch.where(present, scenes.shape[:, :1], -1)
    center = torch.where(present[:, None], middle + towards, -1.0)
    pushed = fitted(
        replace(scenes, count=torch.full_like(scenes.count, 2), color=color, shape=shape, size=size, cell=pair),
        center=center,
        radius=large,
    )
    found = detect(render(pushed))
    assert float((found.clear & (found.count == 2)).float().mean()) >= REQUIRED
    assert torch.equal(found.shape[found.count == 2, :2], shape[found.count == 2, :2])


def painted(shape: int, center: tuple[float, float], color: Tensor) -> Tensor:
    """One large object anywhere, in any colour: [1, 3, 32, 32]."""
    mask = world.coverage(torch.tensor([shape]), torch.tensor([center]), torch.tensor([6.2]))
    background = world.BACKGROUND_RGB[:, None, None]
    return background + (color[:, None, None] - background) * mask[:, None]


def test_reads_an_object_across_the_cells() -> None:
    """It is one object, wherever it lies; but a place is stated only of what lies clearly in it."""
    asked = replace(prompts("single_object", 2, 1), size=torch.full((1, 3), -1))
    for shape, center in itertools.product(range(4), ((16.0, 16.0), (16.4, 9.0), (11.0, 17.0))):
        picture = painted(shape, center, world.COLOR_RGB[shape])
        found = detect(picture)
        assert bool(found.clear) and int(found.count) == 1 and int(found.shape[0, 0]) == shape
        assert (found.center[0, 0] - torch.tensor(center)).abs().max() < 0.3
        this = torch.tensor([[shape, -1, -1]])
        inside = [
            judge(picture, replace(asked, shape=this, position=torch.tensor([[p, -1, -1]]))) for p in range(-1, 8)
        ]
        assert bool(inside[0]) and not any(bool(right) for right in inside[1:5])
        assert sum(bool(right) for right in inside[5:]) == (0 if center == (16.0, 16.0) else 1)


def test_a_foreign_colour_is_no_colour() -> None:
    asked = replace(prompts("single_object", 2, 1), size=torch.full((1, 3), -1), position=torch.full((1, 3), -1))
    foreign = {
        "orange": (0.91, 0.45, 0.10),
        "black": (0.0, 0.0, 0.0),
        "brown": (0.5, 0.3, 0.1),
        "pink": (1.0, 0.5, 0.7),
    }
    for shape in range(4):
        this = replace(asked, shape=torch.tensor([[shape, -1, -1]]))
        assert all(bool(judge(painted(shape, (8.0, 24.0), color), this)) for color in world.COLOR_RGB)
        for name, color in foreign.items():
            assert not bool(judge(painted(shape, (8.0, 24.0), torch.tensor(color)), this)), (name, SHAPES[shape])


def test_reads_soft_and_noisy_pictures() -> None:
    scenes, asked = true_pairs(400, CAPTION_KINDS)
    clean = render(scenes)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(clean.shape, generator=generator)
    for deviation, sigma in ((0.5, 0.0), (0.6, 0.0), (0.7, 0.0), (0.0, 0.03), (0.6, 0.02)):
        pictures = (soften(clean, deviation) if deviation else clean) + sigma * noise
        assert psnr(pictures, clean) < 35.0
        right = judge(pictures, asked)
        assert float(right.float().mean()) >= 0.99, f"blur {deviation}, noise {sigma}, {psnr(pictures, clean):.1f} dB"
    wrong = replace(asked, shape=torch.where(asked.shape >= 0, (asked.shape + 1) % 4, -1))
    assert not bool(judge(soften(clean, 0.7), wrong).any())


def report_prompts(n: int) -> Captions:
    return concatenate([prompts(kind, 2, n) for kind in (*CAPTION_KINDS[:6], "held_out")])


def test_pictures_of_nothing_score_zero() -> None:
    asked = report_prompts(60)
    n, generator = len(asked), torch.Generator().manual_seed(SEED)
    plain = torch.tensor([0.0, 0.5, 1.0]).repeat(n)[:n, None, None, None].expand(n, 3, 32, 32)
    tint = world.COLOR_RGB[torch.arange(n) % 6][:, :, None, None].expand(n, 3, 32, 32)
    noise = torch.rand(n, 3, 32, 32, generator=generator)
    confetti = world.COLOR_RGB[torch.randint(6, (n, 32, 32), generator=generator)].permute(0, 3, 1, 2)
    blocks = functional.interpolate(torch.rand(n, 3, 8, 8, generator=generator), scale_factor=4.0)
    real = render(sample(SEED, torch.arange(n)))
    nothing = {
        "background": world.BACKGROUND_RGB[:, None, None].expand(n, 3, 32, 32),
        "uniform": plain,
        "one colour": tint,
        "noise": noise,
        "soft noise": soften(noise, 2.0),
        "grey noise": 0.5 + 0.15 * torch.randn(n, 3, 32, 32, generator=generator),
        "confetti": confetti,
        "blocks": blocks,
        "mean colour": real.mean((2, 3), keepdim=True).expand_as(real),
        "shuffled pixels": real.flatten(2)[:, :, torch.randperm(1024, generator=generator)].view_as(real),
        "not finite": torch.full((n, 3, 32, 32), float("nan")),
    }
    for name, pictures in nothing.items():
        assert int(judge(pictures, asked).sum()) == 0, name


def test_averaged_pictures_score_zero() -> None:
    """The mean of what was asked for, over the places it may be, is a picture of nothing."""
    for kind in CAPTION_KINDS[:6]:
        scenes, asked = true_pairs(1600, (kind,))
        groups = render(scenes).view(100, 16, 3, 32, 32)
        for many in (4, 16):
            average = groups[:, :many].mean(1).repeat_interleave(16, dim=0)
            assert int(judge(average, asked).sum()) == 0, (kind, many)


def test_one_object_averaged_over_its_places_scores_zero() -> None:
    scenes, asked = true_pairs(64, ("single_object",))
    asked = replace(asked, position=torch.full_like(asked.position, -1))
    everywhere = torch.stack(
        [
            render(fitted(scenes, cell=put(scenes.cell, torch.zeros(64, 1).long(), torch.full((64, 1), c))))
            for c in range(4)
        ]
    )
    assert bool(judge(everywhere.flatten(0, 1), concatenate([asked] * 4)).all())
    for cells in ([0, 1], [0, 1, 2], [0, 0, 0, 3], [0, 1, 2, 3]):
        assert int(judge(everywhere[cells].mean(0), asked).sum()) == 0, cells


def test_a_flaw_makes_a_picture_fail() -> None:
    scenes, asked = true_pairs(64, ("single_object", "colors"))
    clean = render(scenes)
    free = (scenes.cell[:, 0] + 2) % 4
    x, y = free % 2 * 16 + 6, free // 2 * 16 + 6
    near = (torch.arange(32) >= x[:, None]) & (torch.arange(32) < x[:, None] + 4)
    tall = (torch.arange(32) >= y[:, None]) & (torch.arange(32) < y[:, None] + 4)
    blot = (tall[:, :, None] & near[:, None, :])[:, None].float()
    red = world.COLOR_RGB[0][:, None, None]
    cell, center = scenes.cell[:, 0], scenes.center[:, 0]
    half = (torch.arange(32)[None, None, :] + 0.5 < center[:, 0, None, None]).float()[:, None]
    ghost = render(fitted(scenes, cell=put(scenes.cell, torch.zeros(64, 1).long(), free[:, None])))
    recoloured = render(replace(scenes, color=torch.where(scenes.color >= 0, (scenes.color + 1) % 6, -1)))
    background = world.BACKGROUND_RGB[:, None, None]
    flaws = {
        "a blot": clean * (1 - blot) + red * blot,
        "a grey blot": clean * (1 - blot) + 0.5 * blot,
        "a haze": clean * (1 - 0.3 * blot) + red * 0.3 * blot,
        "a ghost": clean + 0.35 * (ghost - background),
        "half an object": clean * half + background * (1 - half),
        "half of another colour": clean * half + recoloured * (1 - half),
        "washed out": background + 0.5 * (clean - background),
        "dark": 0.5 * clean,
        "negative": 1 - clean,
    }
    assert bool(judge(clean, asked).all()) and len(cell) == 64
    for name, pictures in flaws.items():
        assert int(judge(pictures.clamp(0, 1), asked).sum()) == 0, name
    speck = clean.clone()
    speck[torch.arange(64), :, y, x] = world.COLOR_RGB[0]
    assert bool(judge(speck, asked).all()), "a single pixel is no object"


def brute_force(found: Detections, asked: Captions, row: int) -> bool:
    """The definition, in words of Python."""
    count = int(asked.count[row])
    if not found.clear[row] or found.count[row] != count:
        return False
    for order in itertools.permutations(range(count)):
        good = True
        for o, k in enumerate(order):
            x, y = found.center[row, k].tolist()
            for name in ("color", "shape", "size"):
                want = int(getattr(asked, name)[row, o])
                good &= want < 0 or want == int(getattr(found, name)[row, k])
            sides = {"top": y < 14, "bottom": y > 18, "left": x < 14, "right": x > 18}
            place = int(asked.position[row, o])
            words = (*CELLS, "top", "bottom", "left", "right")[place].split() if place >= 0 else []
            good &= all(sides[word] for word in words)
        if asked.relation[row] >= 0:
            (x0, y0), (x1, y1) = (found.center[row, order[i]].tolist() for i in (0, 1))
            fulfilled = {"left of": x0 < x1 - 8, "right of": x0 > x1 + 8, "above": y0 < y1 - 8, "below": y0 > y1 + 8}
            good &= fulfilled[RELATIONS[int(asked.relation[row])]]
        if good:
            return True
    return False


def test_assignment_against_brute_force() -> None:
    """Few values, so that chance fulfils many captions, with several assignments each."""
    n, generator = 4000, torch.Generator().manual_seed(SEED)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    count = draw(0, MAX_DETECTED + 1, n)
    present = torch.arange(MAX_DETECTED) < count[:, None]
    facts = {name: draw(0, 2, n, MAX_DETECTED).masked_fill(~present, -1) for name in ("color", "shape", "size")}
    center = (32 * torch.rand(n, MAX_DETECTED, 2, generator=generator)).masked_fill(~present[..., None], -1.0)
    clear = torch.rand(n, generator=generator) < 0.95
    found = Detections(clear=clear, count=count, center=center, radius=center[..., 0], **facts)
    wanted = torch.where(torch.rand(n, generator=generator) < 0.8, count.clamp(1, 3), draw(1, 4, n))
    asked_of = torch.arange(3) < wanted[:, None]
    unsaid = torch.rand(n, 4, 3, generator=generator) < 0.7
    said = [draw(0, high, n, 3).masked_fill(~asked_of | unsaid[:, i], -1) for i, high in enumerate((2, 2, 2, 8))]
    relation = draw(0, 4, n).masked_fill((wanted < 2) | (torch.rand(n, generator=generator) < 0.5), -1)
    ids = torch.zeros(n, 1, dtype=torch.int64)
    asked = Captions(ids, ids[:, 0], ids[:, 0], wanted, said[0], said[1], said[2], said[3], relation)
    expected = torch.tensor([brute_force(found, asked, row) for row in range(n)])
    assert 0.05 < float(expected.float().mean()) < 0.9
    for c in (1, 2, 3):
        assert int(expected[wanted == c].sum()) > 50
    assert torch.equal(agree(found, asked), expected)


def test_batches_do_not_matter() -> None:
    pictures = torch.cat([render(sample(SEED, torch.arange(300))), torch.rand(5, 3, 32, 32)])
    pictures[7, 0, 3, 3] = float("inf")
    whole, single = detect(pictures), [detect(picture[None]) for picture in pictures[::9]]
    assert not bool(whole.clear[7]) and not bool(whole.clear[-5:].any())
    for field in fields(Detections):
        parts = torch.cat([getattr(part, field.name) for part in single])
        torch.testing.assert_close(getattr(whole, field.name)[::9], parts, rtol=0, atol=1e-4)


def test_errors_name_the_argument() -> None:
    with pytest.raises(
        ValueError, match=r"pictures: expected float \[N, 3, 32, 32\], got torch.float32 \[2, 3, 16, 32\]"
    ):
        detect(torch.zeros(2, 3, 16, 32))
    with pytest.raises(ValueError, match="pictures: expected float"):
        detect(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="asked: expected 3 captions, one per picture, got 2"):
        judge(torch.zeros(3, 3, 32, 32), prompts("colors", 2, 2))
    assert len(judge(torch.zeros(0, 3, 32, 32), prompts("colors", 2, 2)[:0])) == 0
