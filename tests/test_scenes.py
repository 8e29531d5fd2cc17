"""The world of pictures: pure, inside its cells, drawn as it says, and free of held-out pairs unless asked."""

from dataclasses import replace

import pytest
import torch

from blip3o.data import scenes as world
from blip3o.data.scenes import (
    BACKGROUND_RGB,
    CELL_SIZE,
    COLOR_RGB,
    COLORS,
    EXTENT,
    HELD_OUT,
    KINDS,
    PAIR_HELD_OUT,
    PALETTE_RGB,
    RADIUS_RANGE,
    SHAPES,
    coverage,
    mix64,
    render,
    sample,
    sample_unnamed,
    uniform,
)
from blip3o.evaluate.judge import detect

FIELDS = ("count", "color", "shape", "size", "cell", "center", "radius")


def splitmix(x: int) -> int:
    """splitmix64's finaliser in Python integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_mix64_is_splitmix64():
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first number of seed 0
    values = [0, 1, 2, 0x9E3779B97F4A7C15, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    mixed = mix64(torch.tensor([world.signed(value) for value in values]))
    assert [value % (1 << 64) for value in mixed.tolist()] == [splitmix(value) for value in values]


def test_uniform_is_uniform_and_uncorrelated():
    u = uniform(3, 5, torch.arange(20_000), 32)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.012
    assert (u.var(0) - 1 / 12).abs().max() < 0.004
    correlation = torch.corrcoef(torch.cat([u, uniform(4, 5, torch.arange(20_000), 32)], dim=1).T) - torch.eye(64)
    assert correlation.abs().max() < 0.04
    assert torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1].abs() < 0.04


def test_a_sample_is_a_function_of_seed_and_index():
    index = torch.cat([torch.arange(300), torch.tensor([-1, 2**40, 2**62])])
    whole = sample(7, index)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    shuffled, alone = sample(7, index[order]), [sample(7, index[i : i + 1]) for i in range(0, len(index), 50)]
    for name in FIELDS:
        assert torch.equal(getattr(shuffled, name), getattr(whole[order], name)), name
        assert torch.equal(torch.cat([getattr(one, name) for one in alone]), getattr(whole[::50], name)), name
    assert not torch.equal(sample(8, index).cell, whole.cell)
    assert torch.equal(render(whole)[5:9], render(whole[5:9]))
    assert len(sample(0, torch.arange(0))) == 0 and render(sample(0, torch.arange(0))).shape == (0, 3, 32, 32)


def test_scenes_are_well_formed_and_inside_their_cells():
    scenes = sample(1, torch.arange(50_000))
    present = torch.arange(3) < scenes.count[:, None]
    for name in FIELDS[1:]:
        values = getattr(scenes, name)
        assert ((values >= 0) == (present if values.ndim == 2 else present[..., None])).all(), name
    assert scenes.count.min() == 1 and scenes.count.max() == 3
    cell = torch.where(present, scenes.cell, torch.tensor([-1, -2, -3]))
    assert (cell[:, 0] != cell[:, 1]).all() and (cell[:, 0] != cell[:, 2]).all() and (cell[:, 1] != cell[:, 2]).all()
    middle = torch.stack([cell % 2, cell // 2], dim=-1) * CELL_SIZE + CELL_SIZE / 2
    offset = (scenes.center - middle).abs().amax(-1)
    assert (offset + EXTENT[scenes.shape] * scenes.radius)[present].max() <= CELL_SIZE / 2
    assert offset[present].max() <= world.JITTER + 1e-4  # so that |difference of centres| > 8 tells columns and rows
    assert ((scenes.radius < 5) == (scenes.size == 0))[present].all()


def test_every_value_is_about_as_frequent_as_it_should_be():
    scenes = sample(2, torch.arange(20_000))
    present = scenes.shape >= 0
    pairs = (scenes.color * 4 + scenes.shape)[present].bincount(minlength=24).view(6, 4) / present.sum()
    assert (pairs[~PAIR_HELD_OUT] - 1 / 20).abs().max() < 0.01
    for values, n in ((scenes.cell, 4), (scenes.size, 2)):
        assert (values[present].bincount(minlength=n) / present.sum() - 1 / n).abs().max() < 0.02


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("held_out", ["exclude", "only", "any"])
def test_kinds_keep_their_promise(kind: int, held_out: str):
    scenes = sample(3, torch.arange(5_000), kind=kind, held_out=held_out)
    pair = torch.where(scenes.shape >= 0, scenes.color * 4 + scenes.shape, torch.tensor([-1, -2, -3]))
    one, two, three = pair.unbind(1)
    counts = {"one": {1}, "two": {2}, "count": {2, 3}, "relation": {2}, "three": {3}}[KINDS[kind]]
    assert set(scenes.count.tolist()) == counts
    if KINDS[kind] == "two":
        assert (scenes.shape[:, 0] != scenes.shape[:, 1]).all()
    elif KINDS[kind] == "count":
        same_shape = (scenes.shape == scenes.shape[:, :1]) | (scenes.shape < 0)
        assert same_shape.all()
        share = ((scenes.color == scenes.color[:, :1]) | (scenes.shape < 0)).all(1).float().mean()
        assert 0.45 < share < 0.6 or (held_out == "only" and share == 1)
    else:
        assert (one != two).all() and (one != three).all() and (two != three).all()


def test_held_out_pairs_occur_only_when_asked_for():
    index = torch.arange(50_000)
    for held_out, share in (("exclude", 0.0), ("only", 1.0)):
        scenes = sample(4, index, held_out=held_out)
        present = scenes.shape >= 0
        assert PAIR_HELD_OUT[scenes.color[present], scenes.shape[present]].float().mean() == share
    scenes = sample(4, index, held_out="any")
    present = scenes.shape >= 0
    share = PAIR_HELD_OUT[scenes.color[present], scenes.shape[present]].float().mean()
    assert abs(share - len(HELD_OUT) / 24) < 0.01


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="index must be int64"):
        sample(0, torch.zeros(3))
    with pytest.raises(ValueError, match="index must be int64"):
        sample(0, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="held_out must be"):
        sample(0, torch.arange(3), held_out="none")
    with pytest.raises(ValueError, match="kind must be 0"):
        sample(0, torch.arange(3), kind=5)
    with pytest.raises(ValueError, match="shape, center and radius"):
        coverage(torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2), torch.ones(2))


def inside(shape: int, x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Whether points are in a shape, said in another way than by distances."""
    if SHAPES[shape] == "circle":
        return x * x + y * y <= r * r
    half = r * float(EXTENT[shape])
    if SHAPES[shape] == "square":
        return (x.abs() <= half) & (y.abs() <= half)
    if SHAPES[shape] == "triangle":  # apex on top; half as wide as it is deep below the apex
        return (y <= half) & (x.abs() <= (y + half) / 2)
    arm = r * world.CROSS_ARM
    return ((x.abs() <= half) & (y.abs() <= arm)) | ((x.abs() <= arm) & (y.abs() <= half))


@pytest.mark.parametrize("shape", range(4))
@pytest.mark.parametrize("radius", [3.7, 4.1, 6.5])
def test_coverage_is_the_covered_share_of_each_pixel(shape: int, radius: float):
    center = torch.tensor([[9.3, 17.6]])
    mask = coverage(torch.tensor([shape]), center, torch.tensor([radius]))[0]
    fine = (torch.arange(32 * 16) + 0.5) / 16
    points = inside(shape, fine[None] - 9.3, fine[:, None] - 17.6, radius).float()
    exact = points.view(32, 16, 32, 16).mean((1, 3))
    assert (mask - exact).abs().max() < 0.3  # at a sharp corner
    assert (mask - exact).abs().mean() < 0.004
    assert abs(float(mask.sum() / exact.sum()) - 1) < 0.06


def test_shapes_have_similar_areas_and_are_easy_to_tell_apart():
    masks = {}
    for radius in (3.7, 4.3, 6.0, 6.5):
        center = torch.full((4, 2), 16.0)
        masks[radius] = coverage(torch.arange(4), center, torch.full((4,), radius))
        area = masks[radius].sum((1, 2))
        assert area.max() / area.min() < 1.35
        pair = torch.minimum(masks[radius][:, None], masks[radius][None]).sum((2, 3))
        union = torch.maximum(masks[radius][:, None], masks[radius][None]).sum((2, 3))
        assert (pair / union - torch.eye(4)).max() < 0.85
    assert masks[6.0].sum((1, 2)).min() > 1.5 * masks[4.3].sum((1, 2)).max()


def test_colours_are_far_apart():
    distance = torch.cdist(torch.cat([COLOR_RGB, BACKGROUND_RGB[None]]), torch.cat([COLOR_RGB, BACKGROUND_RGB[None]]))
    assert (distance + 10 * torch.eye(7)).min() > 0.45


def test_unnamed_colours_are_none_of_the_named():
    """What the judge reads in the world's colours it does not read in these, so no held-out pair is shown by them."""
    index = torch.arange(2000)
    drawn = sample_unnamed(3, index)
    present = drawn.cell >= 0
    assert (drawn.color[present] >= len(COLORS)).all() and (drawn.color[~present] == -1).all()
    assert len(drawn.color[present].unique()) > 300 and len(PALETTE_RGB) == int(drawn.color.max()) + 1
    assert torch.equal(PALETTE_RGB[: len(COLORS)], COLOR_RGB)
    unnamed = torch.arange(len(COLORS), len(PALETTE_RGB))
    for shape in range(len(SHAPES)):
        for size in range(2):
            alone = sample(0, torch.zeros_like(unnamed), kind=0)
            first = (torch.arange(3) == 0).expand_as(alone.color)
            alone = replace(
                alone, color=torch.where(first, unnamed[:, None], -1), shape=torch.where(first, shape, -1),
                radius=torch.where(first, RADIUS_RANGE[size].mean(), -1.0),
            )  # fmt: skip
            assert not detect(render(alone)).clear.any()
            assert detect(render(replace(alone, color=alone.color.clamp(max=1)))).clear.all()
    named = sample(3, index, held_out="any")
    for field in FIELDS:
        assert field == "color" or torch.equal(getattr(drawn, field), getattr(named, field))
    some = torch.tensor([5, 1999])
    for field in FIELDS:
        assert torch.equal(getattr(sample_unnamed(3, some), field), getattr(drawn[some], field))


def test_render_draws_every_object_in_its_colour_and_place():
    scenes = sample(5, torch.arange(400))
    pictures = render(scenes)
    assert pictures.shape == (400, 3, 32, 32) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    expected = BACKGROUND_RGB[None, :, None, None].repeat(400, 1, 32, 32)
    for slot in range(3):
        rows = (scenes.shape[:, slot] >= 0).nonzero()[:, 0]
        mask = coverage(scenes.shape[rows, slot], scenes.center[rows, slot], scenes.radius[rows, slot])[:, None]
        tint = COLOR_RGB[scenes.color[rows, slot]][..., None, None]
        expected[rows] = expected[rows] * (1 - mask) + tint * mask
    assert (pictures - expected).abs().max() < 1e-5
    quarter = pictures.unfold(2, 16, 16).unfold(3, 16, 16)  # [N, 3, row, column, 16, 16]
    touched = (quarter - BACKGROUND_RGB[:, None, None, None, None]).abs().amax((1, 4, 5)).flatten(1) > 0.3
    occupied = torch.zeros(400, 5, dtype=torch.bool).scatter_(1, torch.where(scenes.cell < 0, 4, scenes.cell), True)
    assert torch.equal(touched, occupied[:, :4])
