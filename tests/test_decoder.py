"""The visual decoder: where its patches and features go, what it starts as, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from blip3o.config import DecoderConfig
from blip3o.decoder import Decoder, DecoderBlock
from blip3o.flow import FlowConfig

FLOW = FlowConfig(prediction="sample", sigma="uniform", sigma_mean=0.0, sigma_std=1.0)
CONFIG = DecoderConfig(
    feature_width=12, feature_grid=2, image_size=24, patch_size=4, width=48, depth=2, num_heads=3, mlp_width=64,
    time_width=16, eps=1e-6, rope_theta=1e4, flow=FLOW,
)  # fmt: skip


def built(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(3)
    return Decoder(config)


def lively(config: DecoderConfig = CONFIG) -> Decoder:
    """With random weights where a new decoder has zeros."""
    decoder = built(config)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return decoder


def inputs(batch: int = 2, config: DecoderConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
    time = torch.rand(batch, generator=generator) * 1000
    return pixels, time, torch.randn(batch, config.feature_grid**2, config.feature_width, generator=generator)


@pytest.mark.parametrize("change", [{}, {"feature_grid": 1}, {"feature_grid": 6}, {"patch_size": 2, "feature_grid": 3}])
def test_shapes(change: dict[str, int]) -> None:
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    pixels, time, features = inputs(3, config)
    assert lively(config)(pixels, time, features).shape == pixels.shape


def test_a_new_decoder_predicts_zero_and_learns_from_there() -> None:
    decoder = built()
    pixels, time, features = inputs()
    prediction = decoder(pixels, time, features)
    assert not prediction.any()
    (prediction - 1).square().mean().backward()
    assert decoder.patch_out.weight.grad is not None and decoder.patch_out.weight.grad.abs().max() > 0


def test_every_weight_has_a_gradient() -> None:
    decoder = lively()
    pixels, time, features = (t.requires_grad_() for t in inputs())
    decoder(pixels, time, features).square().mean().backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert pixels.grad is not None and features.grad is not None and features.grad.any(-1).all()


def test_patches_come_back_where_they_were() -> None:
    """Blocks that are the identity, and a patch_out that undoes patch_in: the picture itself comes out."""
    config = replace(CONFIG, width=48, depth=1)  # 3 x 4 x 4 pixel values in a patch: as wide as a token
    decoder = built(config)
    with torch.no_grad():
        nn.init.eye_(decoder.patch_in.weight)
        nn.init.eye_(decoder.patch_out.weight)
        decoder.feature_in.weight.zero_()
    pixels, time, features = inputs(2, config)
    prediction = decoder(pixels, time, features)
    rms = pixels.unfold(2, 4, 4).unfold(3, 4, 4).square().mean((1, 4, 5)).sqrt()  # the last norm divides a patch by it
    expected = pixels / rms.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_feature_reaches_its_own_block_of_pixels(grid: int) -> None:
    """With blocks that mix nothing, feature (i, j) moves the pixels of block (i, j), all of them, and no other."""
    config = replace(CONFIG, feature_grid=grid)
    decoder = lively(config)
    with torch.no_grad():
        for block in decoder.blocks:
            assert isinstance(block, DecoderBlock)
            block.modulation.weight.zero_()  # gates closed
    pixels, time, features = inputs(1, config)
    before = decoder(pixels, time, features)
    side = config.image_size // grid
    for cell in range(grid**2):
        changed = features.clone()
        changed[:, cell] += 1
        moved = (decoder(pixels, time, changed) != before)[0].all(0)
        expected = torch.zeros_like(moved)
        row, column = divmod(cell, grid)
        expected[row * side : (row + 1) * side, column * side : (column + 1) * side] = True
        assert torch.equal(moved, expected)


def test_patches_of_a_block_get_different_shares_of_the_feature() -> None:
    config = replace(CONFIG, depth=1)
    decoder = lively(config)
    pixels, time, features = inputs(1, config)
    patches = decoder(torch.zeros_like(pixels), time, features)[0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    rows = patches.permute(1, 2, 0, 3).reshape(36, -1)
    assert len(rows.unique(dim=0)) == 36


def test_attention_carries_features_everywhere_and_time_matters() -> None:
    decoder = lively()
    pixels, time, features = inputs(1)
    before = decoder(pixels, time, features)
    changed = features.clone()
    changed[:, 0] += 1
    assert (decoder(pixels, time, changed) != before).all()
    assert (decoder(pixels, time + 100, features) != before).any()


def test_rows_of_a_batch_do_not_meet() -> None:
    decoder = lively()
    pixels, time, features = inputs(3)
    together = decoder(pixels, time, features)
    for i in range(3):
        alone = decoder(pixels[i : i + 1], time[i : i + 1], features[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["x", "timestep", "features"])
def test_wrong_shapes_are_named(name: str) -> None:
    pixels, time, features = inputs()
    wrong = {"x": (pixels[..., :20], time, features), "timestep": (pixels, time[:1], features)}
    wrong["features"] = (pixels, time, features[:, :3])
    with pytest.raises(ValueError, match=rf"^{name} must be \["):
        built()(*wrong[name])


def test_bfloat16() -> None:
    pixels, time, features = inputs()
    decoder = lively().to(torch.bfloat16)
    out = decoder(pixels.bfloat16(), time, features.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), lively()(pixels, time, features), atol=0.15, rtol=0.1)
