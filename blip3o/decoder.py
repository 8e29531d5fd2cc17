"""The visual decoder: CLIP features to pixels by flow matching.

A small transformer over square pixel patches. Each CLIP feature covers a block of patches; a linear map gives every
patch of the block its own share of the feature, added to the noisy patch. The noise level enters by AdaLN. The
released models use an SDXL-type U-Net instead, which comes from diffusers; this one is what `nano` trains from scratch.

Shapes: B batch, S picture side, P patch side, N = (S / P)^2 patches, D width, H heads, K head_dim, F features, C their
width.
"""

from typing import cast

from einops import rearrange
from torch import Tensor, nn

from blip3o.config import DecoderConfig
from blip3o.layers import attention, gated_residual, grid_rope_table, modulate, rope, swiglu, timestep_embedding

SINUSOIDS = 256


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.eps
        self.modulation = nn.Linear(config.time_width, 6 * config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.modulation(time).chunk(6, dim=-1)  # each [B, D]

        h = self.qkv(modulate(x, scale_a, shift_a, eps=self.eps))  # [B, N, 3D]
        query, key, value = rearrange(h, "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        query, key = rope(query, cos, sin, interleaved=True), rope(key, cos, sin, interleaved=True)
        mixed = rearrange(attention(query, key, value), "b h n k -> b n (h k)")
        x = gated_residual(x, self.out(mixed), gate_a)

        h = swiglu(self.gate_up(modulate(x, scale_m, shift_m, eps=self.eps)))
        return gated_residual(x, self.down(h), gate_m)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = config.image_size // config.patch_size  # along a side
        self.block = self.patches // config.feature_grid  # patches along a side of one feature's block
        patch_values = 3 * config.patch_size**2
        self.patch_in = nn.Linear(patch_values, config.width)
        self.feature_in = nn.Linear(config.feature_width, config.width * self.block**2)
        self.time_in = nn.Sequential(
            nn.Linear(SINUSOIDS, config.time_width), nn.SiLU(), nn.Linear(config.time_width, config.time_width)
        )
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.modulation = nn.Linear(config.time_width, 2 * config.width)
        self.patch_out = nn.Linear(config.width, patch_values)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                     distribution
        every nn.Linear              N(0, 1 / fan_in), bias 0
        modulation, patch_out        0: each block starts as the identity, the decoder's first prediction is 0
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.modulation, self.patch_out):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            nn.init.zeros_(cast(DecoderBlock, block).modulation.weight)

    def forward(self, x: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """x [B, 3, S, S] noisy pixels, timestep [B] in 0..1000, features [B, F, C] -> prediction [B, 3, S, S]."""
        config, batch = self.config, len(x)
        grid, patch = config.feature_grid, config.patch_size
        for name, tensor, shape in (
            ("x", x, (batch, 3, config.image_size, config.image_size)),
            ("timestep", timestep, (batch,)),
            ("features", features, (batch, grid**2, config.feature_width)),
        ):
            if tensor.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")

        head_dim = config.width // config.num_heads
        cos, sin = grid_rope_table(self.patches, head_dim, config.rope_theta, x.device)
        time = nn.functional.silu(self.time_in(timestep_embedding(timestep, SINUSOIDS).to(x.dtype)))  # [B, time_width]
        h = self.patch_in(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch))
        shares = rearrange(
            self.feature_in(features), "b (h w) (i j d) -> b (h i w j) d", h=grid, i=self.block, j=self.block
        )
        h = h + shares  # [B, N, D]
        for block in self.blocks:
            h = block(h, time, cos, sin)
        scale, shift = self.modulation(time).chunk(2, dim=-1)
        h = self.patch_out(modulate(h, scale, shift, eps=config.eps))
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=self.patches, p=patch, q=patch)
