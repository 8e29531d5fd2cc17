"""The released system in use: talk about pictures, draw from prompts, draw a picture again from its CLIP features.

prompt ── language model ──► condition ── diffusion transformer ──► features ── visual decoder ──► picture
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from blip3o import generate
from blip3o.chat import LONGEST_ANSWER, stream
from blip3o.flow import TIMESTEPS
from blip3o.model import Blip3o
from blip3o.processor import Crop, open_image, square, to_pil
from blip3o.qwen_processor import QwenProcessor, Side, Template
from blip3o.unet_decoder import DECODER_GUIDANCE, DECODER_STEPS, UnetDecoder
from blip3o.weights import Layout, local_folder

GUIDANCE, STEPS = 3.0, 30  # as released
DECODER = "diffusion-decoder"
Output = Literal["pil", "pt", "np", "features"]
Seeds = int | Sequence[int]
Callback = Callable[[str, int, float, Tensor], object]


class Pipeline:
    """A model, its processor and, for pictures, its visual decoder. Everything runs where the model's weights are."""

    def __init__(self, model: Blip3o, processor: QwenProcessor, decoder: UnetDecoder | None = None) -> None:
        if decoder is not None and decoder.feature_width != model.config.clip.width:
            raise ValueError(
                f"decoder must read features of width {model.config.clip.width}, it reads {decoder.feature_width}"
            )
        self.model, self.processor, self.decoder = model, processor, decoder
        self._negatives: dict[tuple[object, ...], Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        decoder: str | Path | None = None,
        tower: bool | str | Path = True,
        skip: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Pipeline:
        """Of a checkpoint's folder or hub id, in either layout; see `Blip3o.from_pretrained`.

        decoder   folder of the visual decoder; None: diffusion-decoder/ in the checkpoint, if it is there
        """
        folder = local_folder(place)
        model = Blip3o.from_pretrained(folder, tower=tower, skip=skip, dtype=dtype, device=device)
        processor = QwenProcessor.from_pretrained(folder, model.config)
        found = folder / DECODER if decoder is None else Path(decoder)
        if decoder is None and not found.exists():
            return cls(model, processor)
        dtype = model.llm.output_weight.dtype
        return cls(model, processor, UnetDecoder.from_pretrained(found, dtype=dtype, device=device))

    def save_pretrained(self, folder: str | Path, *, layout: Layout = "blip3o") -> None:
        """Write model and processor, whole or not at all; then the decoder into diffusion-decoder/ beside them."""
        with TemporaryDirectory() as place:  # the processor may have words that its own files lack
            self.processor.save(Path(place))
            self.model.save_pretrained(folder, layout=layout, files=sorted(Path(place).iterdir()))
        if self.decoder is not None:
            self.decoder.save_pretrained(Path(folder) / DECODER)

    def compile(self, **options: Any) -> None:
        """torch.compile of the language model and the diffusion transformer, in place, for any number of tokens.

        There is a graph for each kind of call (with a mask or a cache, one row or more, ...), more kinds than torch
        makes graphs of by itself before it goes on without them: its limit is raised. And numbers such as a norm's eps
        become constants: otherwise each is a tensor made at every call. Both are settings of the process.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._dynamo.config.specialize_float = True
        for network in (self.model.llm, self.model.dit):
            network.compile(**{"dynamic": True, **options})

    # conversations

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The answer to a conversation that may hold pictures; see `stream`."""
        return "".join(self.stream(messages, **options))

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = LONGEST_ANSWER,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer as they are said. `QwenProcessor.conversation` says what messages are."""
        return stream(
            self.model, self.processor, messages, max_new_tokens=max_new_tokens, temperature=temperature,
            generator=generator,
        )  # fmt: skip

    # drawing

    @torch.inference_mode()
    def encode_prompt(
        self, prompts: str | Sequence[str], *, template: Template = "released", padding_side: Side = "left"
    ) -> Tensor:
        """What the queries read off prompts: a condition [B, Q, W] to be given to `generate_image`, as often as wanted.

        template   see `QwenProcessor.drawing_prompt`
        Raises ValueError for no prompts, an unknown template or padding_side, TypeError for a prompt that is no string.
        """
        texts = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
        rows = [self.processor.drawing_prompt(prompt, template) for prompt in texts]
        ids, mask = self.processor.pad(rows, padding_side)
        device = self.model.llm.output_weight.device
        return self.model.condition(ids.to(device), mask.to(device))

    def generate_image(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        condition: Tensor | None = None,
        guidance_scale: float = GUIDANCE,
        num_inference_steps: int = STEPS,
        num_images_per_prompt: int = 1,
        seeds: Seeds | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder_guidance_scale: float = DECODER_GUIDANCE,
        decoder_steps: int = DECODER_STEPS,
        negative_seed: int = 0,
        template: Template = "released",
        padding_side: Side = "left",
        whole_times: bool = True,
        output_type: Output = "pil",
        callback: Callback | None = None,
    ) -> Any:
        """Pictures of prompts, or of a condition that `encode_prompt` gave; those of a prompt follow each other.

        seeds           one for each picture, or the first of numbers that follow each other; a picture depends on its
                        own seed alone, whatever it is drawn together with
        generator       instead of seeds: one of a CPU for each picture, or one for all, which each picture draws on
        negative_seed   of the features that the decoder is guided away from: those of the text " ", drawn once and kept
        whole_times     see `generate.predictor`; True as released
        output_type     "pil": a list of images; "pt": float32 [N, 3, S, S] in 0..1; "np": float32 [N, S, S, 3];
                        "features": what the diffusion transformer drew, [N, F, C], for which no decoder is needed
        callback        (stage, step, time, tensor) after every step, first of stage "features", then "pixels"
        ValueError names a wrong argument.
        """
        _check_output_type(output_type)
        config = self.model.config
        if (config.image_target, config.objective) != ("clip", "flow"):
            raise ValueError(
                f"a pipeline draws CLIP features by flow matching; image_target {config.image_target!r} with objective "
                f"{config.objective!r} is drawn by blip3o.generate.draw"
            )
        if (prompts is None) == (condition is None):
            raise ValueError("either prompts or condition must be given")
        counts = {"num_images_per_prompt": num_images_per_prompt, "num_inference_steps": num_inference_steps}
        _check_numbers(counts | {"decoder_steps": decoder_steps}, guidance_scale, decoder_guidance_scale)
        alone = _generators(1, negative_seed, None, "negative_seed")
        decoder = self.decoder if output_type == "features" else self._decoder()
        if condition is None:
            assert prompts is not None
            condition = self.encode_prompt(prompts, template=template, padding_side=padding_side)
        expected = (config.num_queries, config.llm.width)
        if not isinstance(condition, Tensor):
            raise TypeError(f"condition must be a tensor, got {type(condition).__name__}")
        if condition.dim() != 3 or condition.shape[1:] != expected or not len(condition):
            raise ValueError(f"condition must be [B, {expected[0]}, {expected[1]}], got {list(condition.shape)}")
        generators = _generators(len(condition) * num_images_per_prompt, seeds, generator)
        noise = self._noise(generators, decoder)
        options: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "steps": num_inference_steps,
            "whole_times": whole_times,
        }
        features = self._features(condition, noise[0], callback, **options)
        if output_type == "features":
            return features
        key = (
            alone[0].initial_seed(),
            guidance_scale,
            num_inference_steps,
            whole_times,
            features.dtype,
            features.device,
        )
        if key not in self._negatives:
            blank = self.encode_prompt(" ", template="raw")
            self._negatives[key] = self._features(blank, self._noise(alone, None)[0], None, **options)
        return self._pictures(
            features, self._negatives[key], noise[1], decoder_guidance_scale, decoder_steps, output_type, callback
        )

    def _noise(self, generators: Sequence[torch.Generator], decoder: UnetDecoder | None) -> tuple[Tensor, Tensor]:
        """Noise of features [N, F, C], and of latents where there is a decoder: a picture's from its own generator."""
        config, weight = self.model.config, self.model.llm.output_weight
        features, latents = [], []
        for generator in generators:
            features.append(torch.randn(config.feature_grid**2, config.clip.width, generator=generator))
            if decoder is not None:
                latents.append(torch.randn(decoder.latent_shape, generator=generator))
        empty = torch.empty(0)
        return torch.stack(features).to(weight), torch.stack(latents).to(weight) if latents else empty

    @torch.inference_mode()
    def _features(
        self,
        condition: Tensor,
        noise: Tensor,
        callback: Callback | None,
        *,
        guidance_scale: float,
        steps: int,
        whole_times: bool,
    ) -> Tensor:
        def after(step: int, level: float, features: Tensor) -> None:
            if callback is not None:
                callback("features", step, level * TIMESTEPS, features)

        features = generate.sample_targets(
            self.model, condition.to(noise), noise, guidance=guidance_scale, steps=steps, whole_times=whole_times,
            after=after,
        )  # fmt: skip
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"the features drawn are not finite: the weights are not, or are too large for {features.dtype}, or "
                f"guidance_scale {guidance_scale} is too large"
            )
        return features

    def _decoder(self) -> UnetDecoder:
        if self.decoder is None:
            raise ValueError(
                f"this checkpoint has no visual decoder ({DECODER}/): give from_pretrained its folder as decoder, or "
                f"ask for output_type='features'"
            )
        return self.decoder

    def _pictures(
        self,
        features: Tensor,
        negative: Tensor,
        noise: Tensor,
        guidance_scale: float,
        steps: int,
        output_type: Output,
        callback: Callback | None,
    ) -> Any:
        told = None if callback is None else lambda step, time, latents: callback("pixels", step, time, latents)
        pictures = self._decoder().decode(
            features, negative, noise, guidance_scale=guidance_scale, num_inference_steps=steps, callback=told
        )
        if output_type == "pil":
            return [to_pil(picture) for picture in pictures]
        return pictures if output_type == "pt" else pictures.permute(0, 2, 3, 1).numpy(force=True)

    # pictures again

    @torch.inference_mode()
    def image_features(self, images: Sequence[Any], *, crop: Crop = "squash") -> Tensor:
        """The CLIP features [N, F, C] of pictures: paths, PIL images or tensors [3, H, W] in 0..1.

        crop   "squash": to a square, whatever the shape, as the released reconstruction does; "center": the middle of
               the picture, as in training
        """
        if crop not in get_args(Crop):
            raise ValueError(f"crop must be one of {get_args(Crop)}, got {crop!r}")
        if isinstance(images, str | Image.Image | Tensor) or not isinstance(images, Sequence) or not len(images):
            found = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else repr(images)
            raise ValueError(f"images must be a list of pictures, at least one, got {found}")
        pictures = [square(open_image(image), self.model.config.clip.image_size, crop) for image in images]
        return self.model.features(torch.stack(pictures).to(self.model.llm.output_weight))

    @torch.inference_mode()
    def reconstruct(
        self,
        images: Sequence[Any],
        *,
        crop: Crop = "squash",
        seeds: Seeds | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float = DECODER_GUIDANCE,
        num_inference_steps: int = DECODER_STEPS,
        output_type: Output = "pil",
        callback: Callback | None = None,
    ) -> Any:
        """Pictures drawn again from their CLIP features, guided away from those of a picture of CLIP's mean colour.

        See `image_features` and `generate_image`.
        """
        _check_output_type(output_type)
        _check_numbers({"num_inference_steps": num_inference_steps}, guidance_scale)
        decoder = None if output_type == "features" else self._decoder()
        features = self.image_features(images, crop=crop)
        if decoder is None:
            return features
        side = self.model.config.clip.image_size
        blank = self.model.pool(self.model.clip.vision(features.new_zeros(1, 3, side, side)))
        noise = self._noise(_generators(len(features), seeds, generator), decoder)[1]
        return self._pictures(features, blank, noise, guidance_scale, num_inference_steps, output_type, callback)


def _check_output_type(output_type: Output) -> None:
    if output_type not in get_args(Output):
        raise ValueError(f"output_type must be one of {get_args(Output)}, got {output_type!r}")


def _check_numbers(counts: Mapping[str, int], guidance: float, decoder_guidance: float = 1.0) -> None:
    """Before anything is drawn, which takes long."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {count!r}")
    for name, scale in (("guidance_scale", guidance), ("decoder_guidance_scale", decoder_guidance)):
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise ValueError(f"{name} must be a finite number, got {scale!r}")


def _generators(
    count: int,
    seeds: Seeds | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    name: str = "seeds",
) -> list[torch.Generator]:
    """One for each of `count` pictures; the same one for all where a single one is given."""
    if seeds is not None and generator is not None:
        raise ValueError("seeds and generator must not both be given")
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if generator is not None:
        name, found = "generator", list(generator) if isinstance(generator, Sequence) else [generator]
        for given in found:
            if not isinstance(given, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator, or a list of them, got {given!r}")
    else:
        if seeds is None:
            seeds = int(torch.randint(2**62, ()))
        try:
            if isinstance(seeds, Sequence | Tensor):
                numbers = [index(seed) for seed in seeds]
            else:
                numbers = [index(seeds) + i for i in range(count)]
        except TypeError:
            raise TypeError(f"{name} must be a whole number or a list of them, got {seeds!r}") from None
        if not all(0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{name} must lie in 0..2^63 - 1, got {numbers}")
        found = [torch.Generator().manual_seed(int(number)) for number in numbers]
    if len(found) != count:
        raise ValueError(f"{name} must be one for each of {count} pictures, got {len(found)}")
    return found
