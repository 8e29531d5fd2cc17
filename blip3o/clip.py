"""CLIP: pictures to patch features, and pictures and texts to one space.

The vision tower is EVA-CLIP's: patches, a class token and learned positions; blocks that normalise what they ADD
(post-norm inside the residual); no norm at the end. Its patch tokens, pooled to a small grid, are what the diffusion
transformer learns to draw. The text tower and the projections exist where a CLIP is trained from scratch.

Shapes: B batch, S picture side, P patch side, N = (S / P)^2 patches, T tokens, D width, H heads, K head_dim,
E embed_dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.config import ClipConfig, ClipTextConfig
from blip3o.layers import LayerNorm, attention, patchify


class ClipAttention(nn.Module):
    """Every token sees every token; with a mask [B, 1, 1, T] only the kept ones."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, K]
        mixed = attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ClipMlp(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # the exact GELU, by erf


class ClipVisionBlock(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.attention = ClipAttention(config.width, config.num_heads)
        self.attention_norm = LayerNorm(config.width, config.eps)
        self.mlp = ClipMlp(config.width, config.mlp_width)
        self.mlp_norm = LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_norm(self.attention(x))
        return x + self.mlp_norm(self.mlp(x))


class ClipVision(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(3 * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(1 + config.grid**2, config.width))
        self.blocks = nn.ModuleList(ClipVisionBlock(config) for _ in range(config.depth))
        self.init_weights()

    def init_weights(self) -> None:
        """weight                     distribution
        every nn.Linear              N(0, 1 / fan_in), bias 0
        norms                        weight 1, bias 0
        class_token, positions       N(0, 0.02^2)
        """
        _init_linears_and_norms(self)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> the patch tokens of the last block [B, N, D], row by row."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images must be [B, 3, {side}, {side}], got {list(images.shape)}")
        patches = self.patch_in(patchify(images, self.config.patch_size))  # [B, N, D]
        first = self.class_token.expand(len(images), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positions  # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


def pool_features(tokens: Tensor, grid: int) -> Tensor:
    """Average the square grid of patch tokens down: tokens [B, N, D] -> [B, grid^2, D], row by row."""
    batch, count, width = tokens.shape
    side = math.isqrt(count)
    if side * side != count or side % grid:
        raise ValueError(f"tokens must be a square grid whose side is a multiple of grid = {grid}, got {count} tokens")
    if side == grid:
        return tokens
    block = side // grid
    return tokens.reshape(batch, grid, block, grid, block, width).mean(dim=(2, 4)).view(batch, grid * grid, width)


class ClipTextBlock(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.eps)
        self.attention = ClipAttention(config.width, config.num_heads)
        self.mlp_norm = LayerNorm(config.width, config.eps)
        self.mlp = ClipMlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class ClipText(nn.Module):
    """A pre-norm transformer in which every token sees every token; the text is the mean of its tokens."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(ClipTextBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, config.eps)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                     distribution
        every nn.Linear              N(0, 1 / fan_in), bias 0; what a block adds is divided by sqrt(2 depth)
        norms                        weight 1, bias 0
        embedding, positions         N(0, 0.02^2), N(0, 0.01^2)
        """
        _init_linears_and_norms(self)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ClipAttention | ClipMlp):
                    added = module.out if isinstance(module, ClipAttention) else module.down
                    added.weight.mul_((2 * self.config.depth) ** -0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T] int64; mask [B, T] bool, True for text, False for padding -> [B, D], the mean of the text."""
        tokens = ids.shape[1]
        if tokens > self.config.context:
            raise ValueError(f"ids must have at most context = {self.config.context} tokens, got {tokens}")
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {list(ids.shape)}, got {mask.dtype} {list(mask.shape)}")
        x = self.embedding(ids) + self.positions[:tokens]
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        kept = mask.unsqueeze(-1).to(x.dtype)
        return (self.norm(x) * kept).sum(1) / kept.sum(1).clamp_min(1)


class Clip(nn.Module):
    """Both towers, the projections to the shared space, and the temperature.

    Where config.text is None, as in the released models, there is the vision tower and nothing else.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ClipVision(config)
        self.text = ClipText(config.text) if config.text else None
        if config.text:
            self.image_norm = LayerNorm(config.width, config.eps)
            self.image_out = nn.Linear(config.width, config.embed_dim, bias=False)
            self.text_out = nn.Linear(config.text.width, config.embed_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(0.0))
            self._init_heads()

    def init_weights(self) -> None:
        """The towers', and:

        weight                       distribution
        image_norm                   weight 1, bias 0
        image_out, text_out          N(0, 1 / fan_in)
        logit_scale                  log(1 / 0.07), as in CLIP
        """
        self.vision.init_weights()
        if self.text is not None:
            self.text.init_weights()
            self._init_heads()

    def _init_heads(self) -> None:
        nn.init.ones_(self.image_norm.weight)
        nn.init.zeros_(self.image_norm.bias)
        for linear in (self.image_out, self.text_out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def image_embedding(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, D] -> [B, E] of length 1: their mean, normalised and projected."""
        if self.text is None:
            raise ValueError("this CLIP has no projections (config.text is None)")
        return F.normalize(self.image_out(self.image_norm(tokens.mean(1))), dim=-1)

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T], mask [B, T] bool -> [B, E] of length 1."""
        if self.text is None:
            raise ValueError("this CLIP has no text tower (config.text is None)")
        return F.normalize(self.text_out(self.text(ids, mask)), dim=-1)


def _init_linears_and_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
