"""The released models' visual decoder: Emu2-Gen's U-Net and VAE, of SDXL's type, from diffusers (extra `diffusers`).

The U-Net attends to the CLIP features; their mean stands where SDXL has its pooled text. Guidance is
u + scale (c - u) between the features c and negative ones u, in one batch [c, u].

Shapes: B batch, F features, C their width, D latent channels, L latent side, S picture side.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o.weights_files import CorruptModel, TensorFiles, one_dtype

DECODER_GUIDANCE, DECODER_STEPS = 3.0, 50  # as released
PARTS = ("unet", "vae", "scheduler")
Callback = Callable[[int, float, Tensor], object]


def refuse_pickles(folder: Path) -> None:
    """ValueError where a network's folder holds pickles and no safetensors."""
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{pickles[0]}: a pickle, which may run any code when it is read, so it is not read. Where you "
            f"trust it, convert it: let diffusers load {folder} with use_safetensors=False, and save it"
        )


def read_network(kind: Any, folder: Path) -> Any:
    """A network of diffusers, of class `kind`, from its folder's safetensors: all weights, no whole numbers."""
    sparing = importlib.util.find_spec("accelerate") is not None  # without it diffusers makes random weights first
    network, found = kind.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=sparing
    )
    if found["missing_keys"]:  # which diffusers draws at random
        raise CorruptModel(f"{folder} lacks {', '.join(sorted(found['missing_keys']))}")
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFiles(path) as files:  # diffusers makes numbers of whatever is there
            one_dtype(files, list(files.entries), torch.float32)
    return network


class UnetDecoder:
    """A U-Net, a VAE and a scheduler of diffusers: features to pictures.

    unet        UNet2DConditionModel with added text and time embeddings
    vae         AutoencoderKL; where it says force_upcast, it runs in float32 though the U-Net runs in float16
    scheduler   EulerDiscreteScheduler; its configuration is used, its state is not touched
    Raises ValueError for a U-Net that does not add text and time, or whose widths do not fit, and for a VAE whose
    latents are shifted or standardised.
    """

    def __init__(self, unet: Any, vae: Any, scheduler: Any) -> None:
        sizes = (
            ("unet", "cross_attention_dim"),
            ("unet", "sample_size"),
            ("unet", "in_channels"),
            ("vae", "scaling_factor"),
        )
        for part, name in sizes:
            value = {"unet": unet, "vae": vae}[part].config[name]
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{part}.config.{name} must be a number above 0, got {value!r}")
        if vae.config.latent_channels != unet.config.in_channels:
            raise ValueError(
                f"vae.config.latent_channels must be unet.config.in_channels, {unet.config.in_channels}, "
                f"got {vae.config.latent_channels}"
            )
        if unet.config.addition_embed_type != "text_time":
            raise ValueError(f"unet must add text and time (text_time), got {unet.config.addition_embed_type!r}")
        expected = unet.config.cross_attention_dim + 6 * unet.config.addition_time_embed_dim
        if unet.config.projection_class_embeddings_input_dim != expected:
            raise ValueError(
                f"unet.config.projection_class_embeddings_input_dim must be cross_attention_dim + 6 "
                f"addition_time_embed_dim = {expected}, got {unet.config.projection_class_embeddings_input_dim}"
            )
        for name in ("latents_mean", "latents_std", "shift_factor"):
            if vae.config.get(name) is not None:
                raise ValueError(f"vae.config.{name} must be None, as SDXL's, got {vae.config[name]!r}")
        self.unet, self.vae, self.scheduler = unet.eval(), vae.eval(), scheduler
        self.to(unet.device, unet.dtype)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> UnetDecoder:
        """Of a folder with unet/, vae/ and scheduler/, as a checkpoint's diffusion-decoder/; safetensors alone.

        Raises FileNotFoundError, which names the missing part, and ValueError for pickles, for weights that are missing
        or whole numbers, or without diffusers.
        """
        folder = Path(folder)
        for part in PARTS:
            if not (folder / part).is_dir():
                raise FileNotFoundError(f"{folder / part} is missing: a visual decoder has {', '.join(PARTS)}")
        for part in PARTS[:2]:
            refuse_pickles(folder / part)
        try:
            from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
        except ImportError as error:
            raise ValueError(f"the visual decoder needs diffusers: pip install 'blip3o[diffusers]' ({error})") from None
        unet = read_network(UNet2DConditionModel, folder / "unet")
        vae = read_network(AutoencoderKL, folder / "vae")
        scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        decoder = cls(unet, vae, scheduler)
        return decoder.to(device, dtype or unet.dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write unet/, vae/ and scheduler/ as diffusers does."""
        for part in PARTS:
            getattr(self, part).save_pretrained(Path(folder) / part)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> UnetDecoder:
        # torch's own: diffusers' warns of modules to be kept in float32 where there are none.
        torch.nn.Module.to(self.unet, device, dtype)
        upcast = dtype == torch.float16 and self.vae.config.force_upcast
        torch.nn.Module.to(self.vae, device, torch.float32 if upcast else dtype)
        return self

    @property
    def feature_width(self) -> int:
        return int(self.unet.config.cross_attention_dim)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[D, L, L] of a picture, D the U-Net's channels: 4 in the released one."""
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

    @property
    def image_size(self) -> int:
        """S: the VAE doubles the latents' side at every block but the last."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.inference_mode()
    def decode(
        self,
        features: Tensor,
        negative: Tensor,
        noise: Tensor,
        *,
        guidance_scale: float = DECODER_GUIDANCE,
        num_inference_steps: int = DECODER_STEPS,
        callback: Callback | None = None,
    ) -> Tensor:
        """features [B, F, C], negative [1 or B, F, C], noise [B, D, L, L] -> pictures float32 [B, 3, S, S] in 0..1.

        callback   (step, timestep, latents), after every step
        Raises ValueError, which names the argument, for another shape, fewer than one step, or guidance that is not
        finite.
        """
        batch, width = len(features), self.feature_width
        if features.dim() != 3 or features.shape[-1] != width:
            raise ValueError(f"features must be [B, F, {width}], got {list(features.shape)}")
        if negative.shape[1:] != features.shape[1:] or len(negative) not in (1, batch):
            raise ValueError(
                f"negative must be [1 or {batch}, {features.shape[1]}, {width}], got {list(negative.shape)}"
            )
        if noise.shape != (batch, *self.latent_shape):
            raise ValueError(f"noise must be {[batch, *self.latent_shape]}, got {list(noise.shape)}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale of the decoder must be finite, got {guidance_scale}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        unet, guided = self.unet, guidance_scale != 1.0
        tokens = torch.cat([features, negative.expand(batch, -1, -1)]) if guided else features
        tokens = tokens.to(unet.device, unet.dtype)
        side = self.image_size
        times = tokens.new_tensor([side, side, 0, 0, side, side]).expand(len(tokens), -1)
        added = {"text_embeds": tokens.mean(1), "time_ids": times}  # a row each: any number of pictures goes together
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=unet.device)
        latents = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
        for step, timestep in enumerate(scheduler.timesteps):
            x = scheduler.scale_model_input(latents, timestep)
            x = torch.cat([x, x]) if guided else x
            predicted = unet(x, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
            if guided:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            if callback is not None:
                callback(step, float(timestep), latents)
        # Pictures one by one: the VAE's tensors are the largest there are.
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pictures = [self.vae.decode(row).sample for row in latents.split(1)]
        drawn = torch.cat(pictures).float()
        if not bool(drawn.isfinite().all()):
            raise ValueError(
                f"the pictures drawn are not finite: the features or the visual decoder's weights are not, or are too "
                f"large for {unet.dtype}"
            )
        return (drawn / 2 + 0.5).clamp(0, 1)
