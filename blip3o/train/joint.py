"""The schedule `joint`: understanding and generation in every step, and a language model that learns from both."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from blip3o.model import Blip3o
from blip3o.train.batch import Batch
from blip3o.train.recipe import JointRecipe
from blip3o.train.stages import FeatureBank, GenerationBatch, GenerationStage, UnderstandingBatch, UnderstandingStage


@dataclass(frozen=True)
class JointBatch(Batch):
    """Drawings, and conversations that stand beside their prompts.

    weight   the drawings' values
    scale    the step's values of drawings for each token that its conversations ask for: it makes a mean over tokens a
             mean over values, whichever part of the step this batch is
    """

    generation: GenerationBatch
    understanding: UnderstandingBatch
    scale: float

    def tensors(self) -> dict[str, Tensor]:
        parts = {"generation": self.generation, "understanding": self.understanding}
        return {f"{part}.{name}": x for part, batch in parts.items() for name, x in batch.tensors().items()}

    def to(self, device: torch.device) -> Self:
        return replace(self, generation=self.generation.to(device), understanding=self.understanding.to(device))


class JointStage:
    """The loss is that of the drawings, and `ratio` times that of the conversations, of each the mean over the step.

    There is a conversation for every prompt, so that a step can be taken apart as generation's can.
    """

    name = "joint"

    def __init__(self, model: Blip3o, recipe: JointRecipe, bank: FeatureBank, unnamed: FeatureBank | None) -> None:
        self.model, self.recipe = model, recipe
        self.generation = GenerationStage(model, recipe, bank, unnamed)
        self.understanding = UnderstandingStage(model, recipe.understanding(), bank)
        self.unit = self.generation.unit
        for parameter in self.trainable().values():  # alone, generation freezes the language model
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.understanding.trainable() | self.generation.trainable()

    def batch(self, step: int, rows: range) -> JointBatch:
        draws, conversations = self.recipe.draws_per_prompt, self.understanding.recipe.batch_size
        generation = self.generation.batch(step, rows)
        understanding = self.understanding.batch(step, range(rows.start // draws, rows.stop // draws))
        whole = len(rows) == self.recipe.batch_size
        asked = (understanding if whole else self.understanding.batch(step, range(conversations))).weight
        values = generation.weight / len(rows) * self.recipe.batch_size
        ids = generation.ids + understanding.ids
        return JointBatch(generation.weight, ids, generation, understanding, values / asked)

    def loss(self, batch: JointBatch) -> tuple[Tensor, dict[str, Tensor]]:
        drawn, _ = self.generation.loss(batch.generation)
        answered, _ = self.understanding.loss(batch.understanding)
        answered = batch.scale * answered
        logged = {"generation": drawn.detach(), "understanding": answered.detach()}
        return drawn + self.recipe.ratio * answered, logged

    def finish(self) -> None:
        pass
