"""A foreign autoencoder for the image target `vae` of the large presets: diffusers' AutoencoderKL (extra `diffusers`).

Its latents are shifted and scaled as its configuration says, which makes their variance about 1.

Shapes: B batch, S picture side, Z latent channels, L = S / factor the latents' side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o.unet_decoder import read_network, refuse_pickles


class KlAutoencoder:
    """`Latents` of an AutoencoderKL. It learns nothing: neither encode nor decode keeps anything for a gradient.

    Raises ValueError for a scaling_factor that is no number above 0, and for latents that are standardised by channel.
    """

    def __init__(self, vae: Any) -> None:
        scale = vae.config.scaling_factor
        if type(scale) not in (int, float) or not 0 < scale < float("inf"):
            raise ValueError(f"vae.config.scaling_factor must be a number above 0, got {scale!r}")
        for name in ("latents_mean", "latents_std"):
            if vae.config.get(name) is not None:
                raise ValueError(f"vae.config.{name} must be None, got {vae.config[name]!r}")
        self.vae = vae.eval().requires_grad_(False)
        self.scale, self.shift = scale, vae.config.get("shift_factor") or 0.0

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> KlAutoencoder:
        """Of a folder with config.json and safetensors, as the vae/ of a checkpoint of diffusers.

        Raises FileNotFoundError for a missing folder, ValueError for pickles, for weights that are missing or whole
        numbers, or without diffusers.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"autoencoder's folder {folder} does not exist")
        refuse_pickles(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(f"the autoencoder needs diffusers: pip install 'blip3o[diffusers]' ({error})") from None
        vae = read_network(AutoencoderKL, folder)
        # torch's own: diffusers' warns of modules to be kept in float32 where there are none.
        torch.nn.Module.to(vae, device, dtype or vae.dtype)
        return cls(vae)

    @property
    def channels(self) -> int:
        """Z."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent: the side is halved at every block but the last."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B, 3, S, S] in 0..1 -> latents [B, Z, L, L], the mean of their distribution."""
        pixels = (2 * pictures - 1).to(self.vae.device, self.vae.dtype)
        mean = self.vae.encode(pixels).latent_dist.mean
        return ((mean - self.shift) * self.scale).to(pictures)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, Z, L, L] -> pictures [B, 3, S, S] in 0..1; one by one, to spare memory."""
        rows = (latents / self.scale + self.shift).to(self.vae.device, self.vae.dtype)
        pixels = torch.cat([self.vae.decode(row).sample for row in rows.split(1)])
        return (pixels / 2 + 0.5).clamp(0, 1).to(latents)
