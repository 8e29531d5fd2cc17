"""CLIP: the vision tower beside EVA-CLIP's written out by hand (`parity.py` has its features), the text tower beside
torch's encoder."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blip3o.clip import Clip, ClipText, ClipVision, pool_features
from blip3o.config import ClipConfig, ClipTextConfig
from blip3o.presets import preset

LIMIT = 1e-5
TEXT = ClipTextConfig(vocab_size=50, context=12, width=24, depth=2, num_heads=3, mlp_width=48, eps=1e-6)
TINY = ClipConfig(
    image_size=28, patch_size=7, width=32, depth=2, num_heads=4, mlp_width=64, eps=1e-6, embed_dim=20, text=TEXT
)


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = middle + 0.1 * torch.randn(parameter.shape, generator=generator)


def test_gradients_are_those_of_the_hand_written_tower(world) -> None:
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(2, 64, 224, generator=torch.Generator().manual_seed(2))
    grads = []
    for tower in (world.ours.clip.vision, world.theirs.eva):
        leaf = images.clone().requires_grad_()
        (tower(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() <= LIMIT * grads[1].abs().max()


def test_pooling_is_average_pooling() -> None:
    tokens = torch.randn(2, 64, 5)
    picture = tokens.transpose(1, 2).unflatten(2, (8, 8))
    for grid in (1, 2, 4, 8):
        expected = F.avg_pool2d(picture, 8 // grid).flatten(2).transpose(1, 2)
        assert (pool_features(tokens, grid) - expected).abs().max() <= LIMIT
    with pytest.raises(ValueError, match="multiple of grid = 3, got 64 tokens"):
        pool_features(tokens, 3)
    with pytest.raises(ValueError, match="square grid"):
        pool_features(tokens[:, :60], 2)


def test_text_equals_torch_encoder() -> None:
    """torch's own pre-norm encoder layer computes the same block."""
    ours = ClipText(TEXT)
    randomise(ours)
    encoder = nn.TransformerEncoderLayer(24, 3, 48, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    x = ours.embedding(ids) + ours.positions[:9]
    for block in ours.blocks:
        source, state = block.state_dict(), {}
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = source[f"attention.qkv.{kind}"]
            state[f"self_attn.out_proj.{kind}"] = source[f"attention.out.{kind}"]
            state[f"linear1.{kind}"] = source[f"mlp.up.{kind}"]
            state[f"linear2.{kind}"] = source[f"mlp.down.{kind}"]
            state[f"norm1.{kind}"] = source[f"attention_norm.{kind}"]
            state[f"norm2.{kind}"] = source[f"mlp_norm.{kind}"]
        encoder.load_state_dict(state)
        x = encoder(x, src_key_padding_mask=~mask)
    x = F.layer_norm(x, (24,), ours.norm.weight, ours.norm.bias, 1e-6)
    expected = torch.stack([row[keep].mean(0) for row, keep in zip(x, mask, strict=True)])
    assert (ours(ids, mask) - expected).abs().max() <= LIMIT


def test_padding_changes_no_text() -> None:
    text = ClipText(TEXT)
    ids = torch.randint(0, 50, (1, 5))
    padded = F.pad(ids, (0, 4), value=7)
    mask = torch.arange(9)[None] < 5
    torch.testing.assert_close(text(padded, mask), text(ids, torch.ones(1, 5, dtype=torch.bool)), rtol=0, atol=LIMIT)


def test_embeddings_have_length_one_and_every_parameter_learns() -> None:
    clip = Clip(TINY)
    images, ids = torch.randn(4, 3, 28, 28), torch.randint(0, 50, (4, 6))
    image = clip.image_embedding(clip.vision(images))
    text = clip.text_embedding(ids, torch.ones_like(ids, dtype=torch.bool))
    assert image.shape == text.shape == (4, 20)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(4))
    logits = clip.logit_scale.exp() * image @ text.T
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert not [name for name, p in clip.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_wrong_arguments_are_named() -> None:
    clip = Clip(TINY)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 28, 28\], got \[1, 3, 28, 14\]"):
        clip.vision(torch.zeros(1, 3, 28, 14))
    with pytest.raises(ValueError, match="at most context = 12 tokens, got 13"):
        clip.text(torch.zeros(1, 13).long(), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 3\], got torch.int64"):
        clip.text(torch.zeros(1, 3).long(), torch.ones(1, 3).long())
    with pytest.raises(ValueError, match=r"config\.text is None"):
        Clip(replace(TINY, text=None)).text_embedding(torch.zeros(1, 3).long(), torch.ones(1, 3, dtype=torch.bool))


def test_released_size() -> None:
    """EVA02-CLIP-E/14+: 64 blocks of width 1792, counted by hand."""
    width, mlp = 1792, 15360
    block = 4 * width * width + 4 * width + 2 * width * mlp + mlp + width + 4 * width
    expected = 64 * block + (3 * 14 * 14 * width + width) + width + 1025 * width
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ClipVision(preset("8b").clip).parameters())
    assert count == expected == 4_350_208_256
