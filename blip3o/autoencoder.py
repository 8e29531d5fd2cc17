"""The autoencoder of the image target `vae`: pictures to latents, a few values for many pixels, and back.

Convolutions alone. A side is halved by laying 2 x 2 pixels on top of each other (pixel_unshuffle) before a convolution,
and doubled by the inverse after one. The latents of a picture are a normal distribution, of which training draws and
everything else takes the mean. This one is what `nano` trains from scratch; the large presets take diffusers'
AutoencoderKL, `kl_autoencoder.py`.

Shapes: B batch, S picture side, D width, Z latent channels, L = S / 2^halvings the latents' side.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.config import AutoencoderConfig

LOG_VARIANCE = (-20.0, 10.0)  # bounds of what the encoder may say: its exponential stays finite in bfloat16


class Latents(Protocol):
    """What the model asks of an autoencoder, its own or a foreign one."""

    @property
    def channels(self) -> int:
        """Z."""

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent."""

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B, 3, S, S] in 0..1 -> latents [B, Z, L, L], the mean of their distribution."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, Z, L, L] -> pictures [B, 3, S, S] in 0..1."""


class AutoencoderBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), [B, D, H, W] -> [B, D, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.inner(F.silu(x))))


class Halving(nn.Module):
    """[B, C, H, W] -> [B, D, H / 2, W / 2]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * channels, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pixel_unshuffle(x, 2))


class Doubling(nn.Module):
    """[B, D, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, halvings = config.width, config.halvings
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for i in range(halvings):
            down += [Halving(width if i else 3, width), AutoencoderBlock(width)]
            up += [AutoencoderBlock(width), Doubling(width, width if i < halvings - 1 else 3)]
        self.down = nn.Sequential(*down)
        self.latents_out = nn.Conv2d(width, 2 * config.channels, 1)  # mean, logarithm of the variance
        self.latents_in = nn.Conv2d(config.channels, width, 1)
        self.up = nn.Sequential(*up)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                    distribution
        every nn.Conv2d             N(0, 1 / fan_in), bias 0
        the blocks' out             0: each block starts as the identity
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, AutoencoderBlock):
                nn.init.zeros_(module.out.weight)

    @property
    def channels(self) -> int:
        return self.config.channels

    @property
    def factor(self) -> int:
        return self.config.factor

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures [B, 3, S, S] in 0..1 -> mean and log-variance of their latents, each [B, Z, L, L]."""
        side = self.config.image_size
        if pictures.shape[1:] != (3, side, side):
            raise ValueError(f"pictures must be [B, 3, {side}, {side}], got {list(pictures.shape)}")
        mean, log_variance = self.latents_out(self.down(2 * pictures - 1)).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def encode(self, pictures: Tensor) -> Tensor:
        return self.posterior(pictures)[0]

    def pixels(self, latents: Tensor) -> Tensor:
        """latents [B, Z, L, L] -> pixels [B, 3, S, S], -1 black and 1 white, but not cut to that."""
        side = self.config.image_size // self.factor
        if latents.shape[1:] != (self.channels, side, side):
            raise ValueError(f"latents must be [B, {self.channels}, {side}, {side}], got {list(latents.shape)}")
        return self.up(self.latents_in(latents))

    def decode(self, latents: Tensor) -> Tensor:
        return ((self.pixels(latents) + 1) / 2).clamp(0, 1)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), in nats, of each value; as given."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def drawn(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mean + deviation x noise, all [B, Z, L, L]."""
    return torch.addcmul(mean, (log_variance / 2).exp(), noise)
