"""A training run on disk, and the stages in their order.

RUN/checkpoint/   everything that going on needs: weights, the optimiser's moments, stage and step; one commit
RUN/model/        the model folder that `generate`, `ask` and `evaluate` read; written at every stop and stage end
RUN/log.jsonl     one line every few steps
RUN/faults.jsonl  samples of shards that were faulty and are replaced, one a line; a run that goes on tells them again
RUN/data.json     sums of the shards that each stage on shards reads: it goes on with the same ones
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from blip3o.config import ImageTarget, Objective, to_dict
from blip3o.data import scenes
from blip3o.data.loading import warn
from blip3o.data.tar import Fault
from blip3o.evaluate.exam import answer_questions
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.processor import Processor
from blip3o.train import loop
from blip3o.train.autoencoder import AutoencoderStage
from blip3o.train.batch import Stage
from blip3o.train.checkpoint import STATE, Checkpoint
from blip3o.train.devices import Devices, alone
from blip3o.train.folder import differences, only_writer
from blip3o.train.initial_weights import find_weights
from blip3o.train.joint import JointStage
from blip3o.train.optimizer import Training
from blip3o.train.pictures import draw_prompts, save_picture
from blip3o.train.provenance import write_provenance
from blip3o.train.recipe import (
    CHANGEABLE,
    KINDS,
    AutoencoderRecipe,
    ClipRecipe,
    DecoderRecipe,
    GenerationRecipe,
    JointRecipe,
    Recipe,
    UnderstandingRecipe,
)
from blip3o.train.recipe_shards import ShardGenerationRecipe, ShardUnderstandingRecipe
from blip3o.train.stages import ClipStage, DecoderStage, FeatureBank, GenerationStage, UnderstandingStage
from blip3o.train.stages_shards import ShardGenerationStage, ShardUnderstandingStage, same_data
from blip3o.train.trackers import Tracker
from blip3o.weights import CorruptModel, check_replaceable, save_pretrained, settle
from blip3o.weights_files import grouped

BANK_SEED = 7  # the pictures behind the feature bank; evaluation uses other seeds
WEIGHT_SEED = 0
FINGERPRINT_QUESTIONS = 40  # of each type
NEEDED: dict[str, tuple[str, ...]] = {  # the stages that must be finished before
    "clip": (),
    "autoencoder": (),
    "understanding": ("clip",),
    "generation": ("clip", "understanding"),
    "joint": ("clip",),
    "decoder": ("clip",),
}
# The stage after which a target can become a picture.
WAYS_BACK = {"clip": "decoder", "vae": "autoencoder", "pixels": "clip"}


def fingerprint(model: Blip3o) -> str:
    """SHA-256 over all that answers: the CLIP tower, the projector, the language model, and its answers to an exam."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("clip.", "image_projector.", "llm.", "feature_")):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    training = model.training
    answered, _ = answer_questions(model.eval(), "tune", FINGERPRINT_QUESTIONS)
    model.train(training)
    for kind in sorted(answered):
        digest.update(answered[kind].answers.cpu().numpy().tobytes())
    return digest.hexdigest()


class Run:
    """A model in training, in `folder`. A folder with a checkpoint is gone on with; one without starts anew.

    weights, clip_weights   see `RunRecipe`; they are read once, and their folder is needed as long as the run goes on:
                            it has the tokenizer, and a run with other weights is another run

    Raises ValueError when the folder holds a run of another preset, of other numbers or begun with other weights,
    CorruptModel for a damaged checkpoint, FileExistsError when it holds something else where the checkpoint or the
    model will be; what `find_weights` and `InitialWeights.read` raise.
    """

    def __init__(
        self,
        folder: Path,
        preset_name: str,
        devices: Devices | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        image_target: ImageTarget = "clip",
        objective: Objective = "flow",
        weights: str = "",
        clip_weights: str = "",
    ) -> None:
        self.folder, self.trackers = folder, trackers
        self.devices = devices or alone()
        self.checkpoint = Checkpoint(folder / "checkpoint", self.devices)
        self.config = preset(preset_name, image_target=image_target, objective=objective)
        for place in (self.checkpoint.folder, folder / "model"):
            check_replaceable(place)
        self.weights, self.clip_weights = weights, clip_weights
        initial = find_weights(weights, clip_weights, folder) if weights else None
        self.processor = (
            initial.processor(self.config) if initial else Processor(image_size=self.config.clip.image_size)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(WEIGHT_SEED)
            self.model = Blip3o(self.config).to(self.devices.device)
        self.finished: dict[str, float] = {}  # seconds that each finished stage took
        self.stage, self.step, self.seconds, self.bad_batches = "", 0, 0.0, 0  # of the stage in progress
        self.recipes: dict[str, dict[str, object]] = {}  # of the stages finished and in progress
        self.understood = ""  # the fingerprint of understanding, taken when its stage was finished
        self._banks: dict[bool, FeatureBank] = {}
        self.initial = initial.identity() if initial else ""  # of the weights that the run began with
        self.fresh: list[str] = []  # tensors that these lacked
        if self.checkpoint.exists():
            self._load()
        elif initial:
            self.fresh = initial.read(self.model)

    def _load(self) -> None:
        state = self.checkpoint.read_state()
        try:
            before, config = state["preset"], state["config"]
            self.finished, self.stage, self.understood = state["finished"], state["stage"], state["understood"]
            self.step, self.seconds, self.recipes = state["step"], state["seconds"], state["recipes"]
            self.bad_batches, self.fresh, initial = state["bad_batches"], state["fresh"], state["initial"]
        except KeyError as error:
            raise CorruptModel(f"{self.checkpoint.folder / STATE} is of another version: {error!r}") from None
        if before != self.config.name:
            raise ValueError(f"{self.folder} holds a run of preset {before!r}, not {self.config.name!r}")
        changes = differences(config, to_dict(self.config))
        if changes:
            raise ValueError(f"{self.folder} holds a run of another {before}: {', '.join(changes)}")
        if initial != self.initial:
            raise ValueError(
                f"{self.folder} was begun with {'other' if initial else 'new'} weights: weights and clip_weights must "
                f"be what they were, got {self.weights!r} and {self.clip_weights!r}"
            )
        self._read_model()

    def _read_model(self) -> None:
        self.checkpoint.read_tensors({f"model.{name}": tensor for name, tensor in self.model.state_dict().items()})

    def bank(self, pictures: int, unnamed: bool = False) -> FeatureBank:
        """The frozen features of pictures, or of those whose colours have no name: computed once a process."""
        if unnamed not in self._banks or self._banks[unnamed].count != pictures:
            sample = scenes.sample_unnamed if unnamed else scenes.sample
            self._banks[unnamed] = FeatureBank(self.model, BANK_SEED, pictures, sample)
        return self._banks[unnamed]

    def run_stage(self, name: str, recipe: Recipe, report: Callable[[str], None] = print) -> None:
        """Train one stage, from where it was left. A finished stage is not run again.

        Raises ValueError when another stage must come first, or the folder has begun this one with another recipe;
        BlockingIOError when another process trains in it; what `loop.train` raises.
        """
        if name not in KINDS:
            raise ValueError(f"stage must be one of {', '.join(KINDS)}, got {name!r}")
        begun = {key: value for key, value in self.recipes.get(name, recipe.plain()).items() if key not in CHANGEABLE}
        changes = differences(begun, recipe.fixed())
        if changes:
            raise ValueError(f"{self.folder} was begun with another recipe of stage {name}: {', '.join(changes)}")
        if name in self.finished:
            report(f"stage {name} is finished ({self.finished[name]:.0f} s)")
            return
        missing = [stage for stage in self._needed(name) if not self._has(stage)]
        if missing:
            raise ValueError(
                f"stage {name} needs stage {missing[0]} first; {self.folder} has not finished it, nor holds it in "
                "the weights that it began with"
            )
        if self.stage and self.stage != name:
            raise ValueError(f"{self.folder} is in the middle of stage {self.stage}; finish it before stage {name}")
        way_back = WAYS_BACK[self.config.image_target]
        if recipe.sample_every and (self.config.vision is not None or not self._has(way_back)):
            raise ValueError(
                f"sample_every must be 0 in stage {name}: drawing pictures of image_target "
                f"{self.config.image_target!r} needs nano's kind of model and stage {way_back} before"
            )
        self.devices.agree("stage, step and recipe", [name, self.step, recipe.plain()])
        began = time.perf_counter() - (self.seconds if self.stage == name else 0.0)

        def save(training: Training, step: int, stop: bool) -> None:
            self.stage, self.step, self.seconds = name, step, time.perf_counter() - began
            self.bad_batches = training.bad_batches
            self.recipes[name] = recipe.plain()
            if step == recipe.steps:
                self.finished[name], self.stage, self.step = self.seconds, "", 0
                if name == "understanding":
                    self.understood = self._fingerprint()
            self._save(stage, training, last=stop or step == recipe.steps)

        def restore(training: Training) -> int:
            return self._restore(stage, training) if self.stage == name else 0

        def draw(training: Training, step: int) -> None:
            assert isinstance(self.processor, Processor)  # others are refused above
            with training.ema.in_place() if training.ema else nullcontext():
                model = self.whole_model()
                if model is not None and self.devices.rank == 0:
                    sheet = draw_prompts(model.eval(), self.processor, recipe.prompts)
                    save_picture(sheet, self.folder / "samples" / f"{name}-{step:06}.png")
            self.model.train()

        with only_writer(self.folder, self.devices):
            self.checkpoint.settle()
            if self.devices.rank == 0:
                settle(self.folder / "model")
            try:
                self.model.train()
                stage = self._stage(name, recipe)
                if self.weights:
                    told = f", which lacks {', '.join(grouped(self.fresh))}: these are new" if self.fresh else ""
                    report(f"begun with {self.weights}{told}")
                self._describe(name, recipe)
                loop.train(
                    stage, self.devices, folder=self.folder, save=save, restore=restore,
                    draw=draw if recipe.sample_every else None, trackers=self.trackers,
                )  # fmt: skip
            finally:
                self.checkpoint.wait()
                self.model.requires_grad_(True).eval()
            if self._sharded:  # FSDP cannot be taken off a model
                self.model = Blip3o(self.config).to(self.devices.device).eval()
                self._read_model()

    @property
    def _sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def whole_model(self) -> Blip3o | None:
        """The model in one piece, to be used outside of the loss: all processes must ask. None on the ranks above 0
        where FSDP shares the weights out."""
        if not self._sharded:
            return self.model
        tensors = self.devices.whole(self.model.state_dict())
        if self.devices.rank > 0:
            return None
        with torch.device("meta"):
            model = Blip3o(self.config)
        model.load_state_dict(tensors, assign=True)
        return model.to(self.devices.device)

    def _fingerprint(self) -> str:
        """`fingerprint` of the model; the same on every process."""
        model = self.whole_model()
        found: str = self.devices.gather(None if model is None else fingerprint(model))[0]
        return found

    def _has(self, stage: str) -> bool:
        """Whether what a stage teaches is there. Initial weights hold all that another stage needs, but are out of date
        once what comes before is trained anew."""
        anew = any(before in self.finished for before in self._needed(stage))
        return stage in self.finished or (self.initial != "" and not anew)

    def _needed(self, name: str) -> tuple[str, ...]:
        """The stages that must be finished before: latents can be learned once there is an autoencoder."""
        latents = name in ("generation", "joint") and self.config.autoencoder is not None
        return (*NEEDED[name], "autoencoder") if latents else NEEDED[name]

    def _stage(self, name: str, recipe: Recipe) -> Stage:
        match recipe:
            case ClipRecipe():
                return ClipStage(self.model, recipe)
            case UnderstandingRecipe():
                return UnderstandingStage(self.model, recipe, self.bank(recipe.pictures))
            case AutoencoderRecipe():
                return AutoencoderStage(self.model, recipe)
            case JointRecipe():  # before GenerationRecipe, whose kind it is too
                return JointStage(self.model, recipe, self.bank(recipe.pictures), self._unnamed(recipe))
            case GenerationRecipe():
                return GenerationStage(self.model, recipe, self.bank(recipe.pictures), self._unnamed(recipe))
            case DecoderRecipe():
                return DecoderStage(self.model, recipe, self.bank(recipe.pictures), self._unnamed(recipe))
            case ShardUnderstandingRecipe():
                reading = ShardUnderstandingStage(self.model, recipe, self.processor, self._report_fault)
                same_data(self.folder / "data.json", name, reading.loader.sources)
                return reading
            case ShardGenerationRecipe():
                drawing = ShardGenerationStage(self.model, recipe, self.processor, self._report_fault)
                same_data(self.folder / "data.json", name, drawing.loader.sources)
                return drawing
        raise ValueError(f"stage {name} has no recipe of its kind, got {type(recipe).__name__}")

    def _report_fault(self, fault: Fault) -> None:
        """Say it, and keep it in RUN/faults.jsonl."""
        with (self.folder / "faults.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(fault), default=str) + "\n")
        warn(fault)

    def _unnamed(self, recipe: GenerationRecipe | DecoderRecipe) -> FeatureBank | None:
        return self.bank(recipe.pictures, unnamed=True) if recipe.unnamed else None

    def _describe(self, name: str, recipe: Recipe) -> None:
        """Keep with the run what it is made with."""
        if self.devices.rank == 0:
            stages, config = {**self.recipes, name: recipe.plain()}, self.config
            top = {
                "model": config.name, "image_target": config.image_target, "objective": config.objective,
                "schedule": "joint" if "joint" in stages else "sequential",
                "weights": self.weights, "clip_weights": self.clip_weights,
            }  # fmt: skip
            products = "bfloat16" if loop.uses_bfloat16(recipe) else "float32"
            write_provenance(
                self.folder, top, stages, stage=name, step=self.step, processes=self.devices.world,
                device=str(self.devices.device), products=products, initial=self.initial, fresh=grouped(self.fresh),
            )  # fmt: skip

    def _save(self, stage: Stage, training: Training, last: bool) -> None:
        """While training goes on, unless it is the last time. The model folder is committed before the checkpoint: were
        it after, a kill in between would leave it behind a finished run for good."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.stage:  # in the middle: what the optimiser knows, and parameters that training alone needs
            tensors |= self._training_tensors(stage, training)
        state = {
            "preset": self.config.name, "config": to_dict(self.config), "recipes": self.recipes, "stage": self.stage,
            "step": self.step, "seconds": self.seconds, "bad_batches": self.bad_batches, "finished": self.finished,
            "understood": self.understood, "initial": self.initial, "fresh": self.fresh,
        }  # fmt: skip
        kept = ("model.", "ema.")
        model = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in tensors.items() if name.startswith(kept)}

        def write_model(read: Callable[[Mapping[str, Tensor]], None]) -> None:
            read(model)
            whole = {name.removeprefix("model."): x for name, x in model.items() if name.startswith("model.")}
            for name in whole:  # the average, where there is one, is what the stage would leave behind
                whole[name] = model.get(f"ema.{name}", whole[name])
            save_pretrained(self.model, self.processor, self.folder / "model", whole)

        snapshot = self.checkpoint.snapshot(tensors, state)
        (self.checkpoint.write if last else self.checkpoint.write_behind)(snapshot, write_model)

    def _training_tensors(self, stage: Stage, training: Training) -> dict[str, Tensor]:
        """The optimiser's moments, the average, and the parameters of the stage that are not the model's."""
        own, found = self.model.state_dict(), {}
        for name, parameter in stage.trainable().items():
            if name not in own:
                found[f"trained.{name}"] = parameter.detach()
            found |= {f"{key}.{name}": value for key, value in training.optimizer.state[parameter].items()}
            if training.ema:
                found[f"ema.{name}"] = training.ema.averages[name]
        return found

    def _restore(self, stage: Stage, training: Training) -> int:
        self.checkpoint.read_tensors(self._training_tensors(stage, training))
        training.bad_batches = self.bad_batches
        return self.step


__all__ = ["Run"]
