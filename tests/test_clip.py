"""CLIP against a hand-written tower of torch.nn parts: same weights, float32, 1e-5."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.clip import Clip, ClipText, ClipVision, pool_features
from blip3o.config import ClipConfig, ClipTextConfig
from blip3o.presets import preset

LIMIT = 1e-5
TEXT = ClipTextConfig(vocab_size=50, context=12, width=24, depth=2, num_heads=3, mlp_width=48, eps=1e-6)
TINY = ClipConfig(
    image_size=28, patch_size=7, width=32, depth=2, num_heads=4, mlp_width=64, eps=1e-6, embed_dim=20, text=TEXT
)


class EvaBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x, x, x, need_weights=False)[0])
        return x + self.norm2(self.fc2(F.gelu(self.fc1(x))))


class Eva(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, kernel_size=7, stride=7)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        self.blocks = nn.ModuleList(EvaBlock(32, 4, 64) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = middle + 0.1 * torch.randn(parameter.shape, generator=generator)


def copy_to_ours(theirs: Eva, ours: ClipVision) -> None:
    source = theirs.state_dict()
    state = {
        "patch_in.weight": source["patch_embed.weight"].flatten(1),
        "patch_in.bias": source["patch_embed.bias"],
        "class_token": source["cls_token"][0, 0],
        "positions": source["pos_embed"][0],
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            state[f"blocks.{i}.attention.qkv.{kind}"] = source[f"blocks.{i}.attn.in_proj_{kind}"]
            state[f"blocks.{i}.attention.out.{kind}"] = source[f"blocks.{i}.attn.out_proj.{kind}"]
            state[f"blocks.{i}.attention_norm.{kind}"] = source[f"blocks.{i}.norm1.{kind}"]
            state[f"blocks.{i}.mlp_norm.{kind}"] = source[f"blocks.{i}.norm2.{kind}"]
            state[f"blocks.{i}.mlp.up.{kind}"] = source[f"blocks.{i}.fc1.{kind}"]
            state[f"blocks.{i}.mlp.down.{kind}"] = source[f"blocks.{i}.fc2.{kind}"]
    ours.load_state_dict(state)


def test_vision_equals_the_hand_written_tower() -> None:
    theirs, ours = Eva(), ClipVision(TINY)
    randomise(theirs)
    copy_to_ours(theirs, ours)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    mine, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    y, expected = ours(mine), theirs(other)
    assert y.shape == (2, 16, 32)
    assert (y - expected).abs().max() <= LIMIT
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (mine.grad - other.grad).abs().max() <= LIMIT * other.grad.abs().max()


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
