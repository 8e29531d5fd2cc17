"""The stage of the image target `vae`: the autoencoder learns to turn pictures into latents and back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip3o.autoencoder import Autoencoder, divergence, drawn
from blip3o.data import scenes
from blip3o.model import Blip3o
from blip3o.train.batch import Batch, summed
from blip3o.train.recipe import AutoencoderRecipe
from blip3o.train.stages import set_target_statistics, step_generator


@dataclass(frozen=True)
class AutoencoderBatch(Batch):
    """pictures [B, 3, S, S] in 0..1, and the noise [B, Z, L, L] by which their latents are drawn."""

    pictures: Tensor
    noise: Tensor


class AutoencoderStage:
    """Pictures again from latents that are drawn. The loss is the squared error of pixels from -1 to 1, and `kl_weight`
    times the divergence of the latents from a standard normal distribution, in nats; of each the mean over its values.

    `unnamed` of the batch shows colours without a name, as the visual decoder's does.
    """

    name = "autoencoder"
    unit = 1

    def __init__(self, model: Blip3o, recipe: AutoencoderRecipe) -> None:
        if not isinstance(model.autoencoder, Autoencoder):
            raise ValueError(f"model {model.config.name!r} has no autoencoder of its own to train")
        self.model, self.recipe, self.autoencoder = model, recipe, model.autoencoder

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"autoencoder.{name}": parameter for name, parameter in self.autoencoder.named_parameters()}

    def batch(self, step: int, rows: range) -> AutoencoderBatch:
        recipe, config = self.recipe, self.autoencoder.config
        index = step * recipe.batch_size + torch.arange(recipe.batch_size)
        count = recipe.unnamed_of(recipe.batch_size)
        named, unnamed = index[: len(index) - count], index[len(index) - count :]
        drawn_from = ((scenes.sample, named), (scenes.sample_unnamed, unnamed))
        pictures = torch.cat([scenes.render(sample(recipe.seed, numbers)) for sample, numbers in drawn_from])
        names = [f"scene {i}" for i in named.tolist()] + [f"unnamed scene {i}" for i in unnamed.tolist()]
        side = config.image_size // config.factor
        generator = step_generator(recipe, step)
        noise = torch.randn(recipe.batch_size, config.channels, side, side, generator=generator)
        own = slice(rows.start, rows.stop)
        return AutoencoderBatch(float(pictures[own].numel()), names[own], pictures[own], noise[own])

    def loss(self, batch: AutoencoderBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = self.autoencoder.posterior(batch.pictures)
        pixels = self.autoencoder.pixels(drawn(mean, log_variance, batch.noise))
        squares = (pixels.float() - (2 * batch.pictures - 1)).square().mean()
        nats = divergence(mean.float(), log_variance.float()).mean()
        logged = {"pixels": summed(squares.detach(), batch.weight), "divergence": summed(nats.detach(), batch.weight)}
        return summed(squares + self.recipe.kl_weight * nats, batch.weight), logged

    def finish(self) -> None:
        """From here on latents are standardised, by the statistics of STATISTICS pictures."""
        set_target_statistics(self.model, self.recipe.seed)
