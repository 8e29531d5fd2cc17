"""The vision tower beside transformers' Qwen2.5-VL vision model, with the same weights; `parity.py` has more of it."""

import pytest
import torch
from torch import Tensor

from blip3o.config import VisionConfig
from blip3o.presets import preset
from blip3o.vision import QwenVision, window_order

LIMIT = 1e-5
TINY = VisionConfig(
    width=32,
    depth=2,
    num_heads=2,
    mlp_width=64,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=112,
    full_attention_blocks=(1,),
    out_width=64,
    eps=1e-6,
    rope_theta=1e4,
)


def qwen_vision(config: VisionConfig) -> torch.nn.Module:
    module = pytest.importorskip(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", reason="needs transformers: pip install transformers"
    )
    settings = module.Qwen2_5_VLVisionConfig(
        depth=config.depth,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        spatial_merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        window_size=config.window_size,
        out_hidden_size=config.out_width,
        fullatt_block_indexes=list(config.full_attention_blocks),
    )
    settings._attn_implementation = "eager"
    return module.Qwen2_5_VisionTransformerPretrainedModel(settings)


@pytest.fixture(scope="module")
def pair(world):
    assert world.ours.vision.config == TINY
    return world.ours.vision, world.theirs.qwen.model.visual


def patches(grids: list[tuple[int, int, int]]) -> Tensor:
    count = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(count, TINY.patch_values, generator=torch.Generator().manual_seed(1))


def test_gradients_match(pair) -> None:
    ours, theirs = pair
    grids = [(1, 18, 12), (1, 8, 8)]
    mine, other = (patches(grids).requires_grad_() for _ in range(2))
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(2))
    (ours(mine, grids) * weight).sum().backward()
    (theirs(other, torch.tensor(grids)).pooler_output * weight).sum().backward()
    assert (mine.grad - other.grad).abs().max() <= LIMIT * other.grad.abs().max()


def test_windows_are_squares() -> None:
    order, lengths = window_order([(1, 4, 6)], merge=1, window=2)
    assert lengths.tolist() == [4] * 6
    assert order.view(6, 4).tolist()[:4] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19]]


def test_a_picture_knows_nothing_of_its_neighbour(pair) -> None:
    ours, _ = pair
    both = patches([(1, 10, 8), (1, 4, 4)])
    together = ours(both, [(1, 10, 8), (1, 4, 4)])
    torch.testing.assert_close(together[:20], ours(both[:80], [(1, 10, 8)]), rtol=0, atol=LIMIT)
    torch.testing.assert_close(together[20:], ours(both[80:], [(1, 4, 4)]), rtol=0, atol=LIMIT)


def test_wrong_arguments_are_named() -> None:
    tower = QwenVision(TINY)
    with pytest.raises(ValueError, match=r"patches must be \[16, 1176\], got \[15, 1176\]"):
        tower(torch.zeros(15, 1176), [(1, 4, 4)])
    with pytest.raises(ValueError, match="multiples of merge_size 2, got"):
        tower(torch.zeros(12, 1176), [(1, 3, 4)])


@pytest.mark.parametrize("name", ["4b", "8b"])
def test_released_sizes(name: str) -> None:
    config = preset(name).vision
    assert config is not None
    with torch.device("meta"):
        theirs = sum(p.numel() for p in qwen_vision(config).parameters())
        ours = sum(p.numel() for p in QwenVision(config).parameters())
    assert ours == theirs
