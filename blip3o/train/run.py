"""A training run on disk, and the stages in their order.

    RUN/checkpoint/   everything that going on needs: weights, the optimiser's moments, stage and step; one commit
    RUN/model/        the model folder that `generate`, `ask` and `evaluate` read; written at every stop and stage end
    RUN/log.jsonl     one line every few steps
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o.evaluate.exam import answer_questions
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.processor import Processor
from blip3o.train import loop
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.stages import ClipStage, DecoderStage, FeatureBank, GenerationStage, UnderstandingStage
from blip3o.weights import CorruptModel, check_folder, commit_folder, save_pretrained, staging

BANK_SEED = 7  # the pictures behind the feature bank; evaluation uses other seeds
WEIGHT_SEED = 0
FINGERPRINT_QUESTIONS = 40  # of each type


def fingerprint(model: Blip3o) -> str:
    """SHA-256 over all that answers: the CLIP tower, the projector, the language model, and its answers to an exam."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("clip.", "image_projector.", "llm.", "feature_")):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    training = model.training
    answered, _ = answer_questions(model.eval(), "tune", FINGERPRINT_QUESTIONS)
    model.train(training)
    for kind in sorted(answered):
        digest.update(answered[kind].answers.numpy().tobytes())
    return digest.hexdigest()


class Run:
    """A model in training, in `folder`. A folder with a checkpoint is gone on with; one without starts anew."""

    def __init__(self, folder: Path, preset_name: str) -> None:
        self.folder = folder
        self.config = preset(preset_name)
        self.processor = Processor()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WEIGHT_SEED)
            self.model = Blip3o(self.config)
        self.finished: dict[str, float] = {}  # seconds that each finished stage took
        self.stage, self.step, self.seconds = "", 0, 0.0  # of the stage in progress
        self.recipe_of_step: dict[str, object] = {}
        self.understood = ""  # the fingerprint of understanding, taken when its stage was finished
        self._bank: FeatureBank | None = None
        self._tensors: dict[str, Tensor] = {}
        if (folder / "checkpoint").exists() or (folder / "checkpoint.old").exists():
            self._load()

    def _load(self) -> None:
        folder = self.folder / "checkpoint"
        check_folder(folder)
        state = json.loads((folder / "training.json").read_text())
        if state["preset"] != self.config.name:
            raise ValueError(f"{folder} holds a run of preset {state['preset']!r}, not {self.config.name!r}")
        self.finished, self.stage, self.understood = state["finished"], state["stage"], state["understood"]
        self.step, self.seconds, self.recipe_of_step = state["step"], state["seconds"], state["recipe"]
        self._tensors = load_file(folder / "state.safetensors")
        own = self.model.state_dict()
        weights = {name[6:]: tensor for name, tensor in self._tensors.items() if name.startswith("model.")}
        if own.keys() != weights.keys():
            raise CorruptModel(f"{folder} holds tensors of another version: {sorted(own.keys() ^ weights.keys())[:5]}")
        self.model.load_state_dict(weights)

    def bank(self, pictures: int) -> FeatureBank:
        """The frozen features, computed once a process."""
        if self._bank is None or self._bank.count != pictures:
            self._bank = FeatureBank(self.model, BANK_SEED, pictures)
        return self._bank

    def run_stage(self, name: str, recipe: Recipe, report: Callable[[str], None] = print) -> None:
        """Train one stage, from where it was left. A finished stage is not run again."""
        if name in self.finished:
            report(f"stage {name} is finished ({self.finished[name]:.0f} s)")
            return
        needed = {"clip": (), "understanding": ("clip",), "generation": ("clip", "understanding"), "decoder": ("clip",)}
        missing = [stage for stage in needed[name] if stage not in self.finished]
        if missing:
            raise ValueError(f"stage {name} needs stage {missing[0]} first; {self.folder} has not finished it")
        if self.stage and self.stage != name:
            raise ValueError(f"{self.folder} is in the middle of stage {self.stage}; finish it before stage {name}")
        began = time.perf_counter() - (self.seconds if self.stage == name else 0.0)
        self.model.train()
        if name == "clip":
            stage: loop.Stage = ClipStage(self.model, recipe)
        elif name == "understanding":
            stage = UnderstandingStage(self.model, recipe, self.bank(recipe.pictures))
        elif name == "generation":
            stage = GenerationStage(self.model, recipe, self.bank(recipe.pictures))
        else:
            stage = DecoderStage(self.model, recipe, self.bank(recipe.pictures))

        def save(optimizer: torch.optim.Optimizer, step: int) -> None:
            self.stage, self.step, self.seconds = name, step, time.perf_counter() - began
            if step == recipe.steps:
                self.finished[name], self.stage, self.step = self.seconds, "", 0
                if name == "understanding":
                    self.understood = fingerprint(self.model)
            self._save(stage, optimizer, recipe)

        def restore(optimizer: torch.optim.Optimizer) -> int:
            return self._restore(stage, optimizer, recipe) if self.stage == name else 0

        try:
            loop.train(stage, log=self.folder / "log.jsonl", save=save, restore=restore)
        finally:
            self.model.requires_grad_(True).eval()

    def _save(self, stage: loop.Stage, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.stage:  # in the middle: what the optimiser knows, and parameters that training alone needs
            for name, parameter in stage.trainable().items():
                tensors[f"trained.{name}"] = parameter.detach()
                for key, value in optimizer.state[parameter].items():
                    tensors[f"{key}.{name}"] = value
        staged = staging(self.folder / "checkpoint")
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, staged / "state.safetensors")
        state = {
            "preset": self.config.name, "stage": self.stage, "step": self.step, "seconds": self.seconds,
            "finished": self.finished, "understood": self.understood, "recipe": asdict(recipe),
        }  # fmt: skip
        (staged / "training.json").write_text(json.dumps(state, indent=2) + "\n")
        commit_folder(staged, self.folder / "checkpoint")
        save_pretrained(self.model, self.processor, self.folder / "model")

    def _restore(self, stage: loop.Stage, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
        if asdict(recipe) != self.recipe_of_step:
            raise ValueError(f"{self.folder} was begun with another recipe of {stage.name}: {self.recipe_of_step}")
        with torch.no_grad():
            for name, parameter in stage.trainable().items():
                parameter.copy_(self._tensors[f"trained.{name}"])
                optimizer.state[parameter] = {
                    key: self._tensors[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return self.step


__all__ = ["STAGES", "Run"]
