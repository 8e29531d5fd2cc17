"""The paper's choices: what is made (CLIP features, latents, pixels), by which objective, in which schedule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import narrow
from torch import Tensor

from blip3o import regression
from blip3o.autoencoder import Autoencoder, divergence, drawn
from blip3o.config import AutoencoderConfig, Blip3oConfig, ImageTarget, Objective
from blip3o.data import scenes, text
from blip3o.generate import draw, draw_targets, generate, noise_for
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.processor import Processor
from blip3o.weights import from_pretrained, save_pretrained

TARGETS: tuple[ImageTarget, ...] = get_args(ImageTarget)
CHOICES: list[tuple[ImageTarget, Objective]] = [
    (target, objective) for target in TARGETS for objective in get_args(Objective)
]


def small(image_target: ImageTarget = "clip", objective: Objective = "flow") -> Blip3oConfig:
    """A narrow nano with these choices."""
    config = preset("nano", image_target=image_target, objective=objective)
    features = narrow(preset("nano"))
    autoencoder = replace(config.autoencoder, width=8) if config.autoencoder else None
    if image_target == "clip":
        return replace(features, objective=objective)
    dit = replace(features.dit, grid=config.dit.grid, in_channels=config.dit.in_channels)
    return replace(
        features, image_target=image_target, objective=objective, dit=dit, decoder=None, autoencoder=autoencoder
    )


def lively_model(image_target: ImageTarget = "clip", objective: Objective = "flow") -> Blip3o:
    """With random weights everywhere: what starts at zero in a new model hides mistakes."""
    torch.manual_seed(5)
    model = Blip3o(small(image_target, objective)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1))
        if image_target != "clip":
            model.set_target_statistics(model.targets(pictures(64)))
    return model


def pictures(count: int) -> Tensor:
    return scenes.render(scenes.sample(3, torch.arange(count)))


# configurations


@pytest.mark.parametrize("name", ["nano", "4b", "8b"])
@pytest.mark.parametrize(("image_target", "objective"), CHOICES)
def test_every_preset_has_every_choice(name: str, image_target: ImageTarget, objective: Objective) -> None:
    config = preset(name, image_target=image_target, objective=objective)
    assert (config.name, config.image_target, config.objective) == (name, image_target, objective)
    assert (config == preset(name)) == (image_target == "clip" and objective == "flow")


def change(config: Blip3oConfig, **values: Any) -> Callable[[], Blip3oConfig]:
    return lambda: replace(config, **values)


def named(**values: Any) -> Callable[[], Blip3oConfig]:
    return lambda: preset("nano", **values)


NANO, VAE, PIXELS = (preset("nano", image_target=target) for target in TARGETS)
OWN = VAE.autoencoder


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (named(image_target="depth"), r"image_target must be one of \('clip', 'vae', 'pixels'\), got 'depth'"),
        (named(objective="mae"), r"objective must be one of \('flow', 'mse'\), got 'mae'"),
        (change(VAE, decoder=NANO.decoder), r"decoder must be None: it draws CLIP features, image_target is 'vae'"),
        (change(PIXELS, decoder=NANO.decoder), r"decoder must be None: .* image_target is 'pixels'"),
        (change(PIXELS, autoencoder=OWN), r"autoencoder must be None: image_target is 'pixels', not 'vae'"),
        (change(NANO, autoencoder=OWN), r"autoencoder must be None: image_target is 'clip', not 'vae'"),
        (change(PIXELS, dit=NANO.dit), r"dit\.in_channels must equal the values of a patch, .* 128 .* 768"),
        (change(PIXELS, dit=replace(PIXELS.dit, grid=5)), r"image_size must be a multiple of dit\.grid = 5, got 32"),
        (change(VAE, dit=replace(VAE.dit, in_channels=4)), r"dit\.in_channels must equal the values of a patch"),
        (change(VAE, dit=replace(VAE.dit, grid=3)), r"2\^halvings must be a multiple of dit\.grid = 3, got 8"),
        (
            lambda: replace(VAE, autoencoder=AutoencoderConfig(image_size=64, channels=8, halvings=2, width=8)),
            r"autoencoder\.image_size must equal clip\.image_size",
        ),
        (lambda: AutoencoderConfig(image_size=36, channels=8, halvings=3, width=8), r"must be a multiple of 2\^halv"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# targets, and the way back


@pytest.mark.parametrize("image_target", TARGETS)
def test_targets_are_standardised(image_target: ImageTarget) -> None:
    model, shown = lively_model(image_target), pictures(64)
    dit = model.config.dit
    with torch.no_grad():
        if image_target == "clip":
            model.set_feature_statistics(model.features(shown))
        targets = model.targets(shown)
    assert targets.shape == (64, dit.grid**2, dit.in_channels)
    flat = targets.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(dit.in_channels), atol=1e-3, rtol=0)
    assert flat.std(0).max() < 1.01 and flat.std(0).median() > 0.99


def test_pixels_come_back() -> None:
    model, shown = lively_model("pixels"), pictures(8)
    torch.testing.assert_close(model.pictures(model.targets(shown)), shown, atol=1e-5, rtol=0)
    first = model.targets(shown)[0, 1] * model.target_std + model.target_mean  # the second patch of the first row
    torch.testing.assert_close(first.view(3, 8, 8), 2 * shown[0, :, :8, 8:16] - 1, atol=1e-5, rtol=0)


def test_latents_come_back_and_are_decoded() -> None:
    model, shown = lively_model("vae"), pictures(4)
    assert isinstance(model.autoencoder, Autoencoder)
    with torch.no_grad():
        latents = model.autoencoder.encode(shown)
        assert latents.shape == (4, 8, 8, 8)
        expected = model.autoencoder.decode(latents)
        torch.testing.assert_close(model.pictures(model.targets(shown)), expected, atol=1e-5, rtol=0)
    assert expected.shape == shown.shape and 0 <= expected.min() and expected.max() <= 1
    with pytest.raises(ValueError, match=r"pictures must be \[B, 3, 32, 32\], got \[4, 3, 16, 16\]"):
        model.autoencoder.encode(shown[:, :, :16, :16])
    with pytest.raises(ValueError, match=r"latents must be \[B, 8, 8, 8\], got \[4, 8, 4, 4\]"):
        model.autoencoder.decode(latents[:, :, :4, :4])


def test_features_have_no_inverse() -> None:
    model = lively_model()
    with pytest.raises(ValueError, match=r"CLIP features have no inverse: the visual decoder draws them"):
        model.pictures(torch.zeros(1, 4, 32))


def test_divergence_is_that_of_torchs_normal_distributions() -> None:
    mean, log_variance = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mean, log_variance), expected)
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    sample = drawn(torch.full_like(noise, 2.0), torch.full_like(noise, 4.0).log(), noise)
    assert abs(sample.mean().item() - 2) < 0.05 and abs(sample.std().item() - 2) < 0.05


# drawing


@pytest.mark.parametrize(("image_target", "objective"), CHOICES)
def test_every_choice_draws_and_comes_back_from_its_files(
    image_target: ImageTarget, objective: Objective, tmp_path: Path
) -> None:
    model = lively_model(image_target, objective)
    options = {"steps": 2} if objective == "flow" else {}
    prompts = ["a red circle", "two blue squares"]
    pictures = generate(model, Processor(), prompts, n=2, **options)
    assert pictures.shape == (4, 3, 32, 32) and 0 <= pictures.min() and pictures.max() <= 1
    assert (pictures[0] - pictures[2]).abs().max() > 1e-3
    if image_target != "clip":  # whose visual decoder has noise of its own
        assert torch.equal(pictures[0], pictures[1]) == (objective == "mse")
    save_pretrained(model, Processor(), tmp_path / "model")
    loaded, processor = from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(generate(loaded, processor, prompts, n=2, **options), pictures)


def prompt(count: int = 1) -> tuple[Tensor, Tensor]:
    return text.drawing_prompts(text.captions(scenes.sample(1, torch.arange(count)), 1, torch.arange(count)))


def test_what_a_choice_has_no_use_for_is_refused() -> None:
    regressing, pixels = lively_model("clip", "mse"), lively_model("pixels")
    for options in ({"guidance": 1.0}, {"steps": 3}):
        with pytest.raises(ValueError, match=r"guidance and steps are a sampler's, and .* objective 'mse' has none"):
            draw(regressing, *prompt(), [0], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps are the visual decoder's; pixels have no need of one"):
        draw(pixels, *prompt(), [0], steps=2, decoder_steps=3)


def test_regression_is_the_network_without_noise() -> None:
    """Each prompt is answered once, for all of its seeds; the loss is the mean squared error of that answer."""
    model = lively_model("vae", "mse")
    noise = noise_for(model, [0, 1, 2, 3])[0]
    found = draw_targets(model, *prompt(2), noise)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[0], found[2])
    with torch.no_grad():
        condition = model.dit.project(model.condition(*prompt(2)))
        expected = model.dit(torch.ones(2, 16, 32), torch.full((2,), 1000.0), condition)
    torch.testing.assert_close(found[::2], expected, atol=1e-5, rtol=1e-5)
    x = torch.randn_like(expected)
    loss = regression.training_loss(lambda _, sigma: expected * sigma.view(-1, 1, 1), x)
    torch.testing.assert_close(loss, (expected - x).square().mean())


# a foreign autoencoder


def foreign() -> Any:
    """diffusers' AutoencoderKL, small: 4 channels, 2 pixels a side for each latent."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=8, sample_size=32, scaling_factor=0.5,
        shift_factor=0.25, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def without_own() -> Blip3o:
    config = small("vae")
    return Blip3o(replace(config, autoencoder=None, dit=replace(config.dit, grid=8, in_channels=16))).eval()


def test_diffusers_autoencoder_is_given_by_its_folder(tmp_path: Path) -> None:
    vae = foreign()
    from blip3o.kl_autoencoder import KlAutoencoder

    vae.save_pretrained(tmp_path / "vae")
    model, shown = without_own(), pictures(3)
    weights = set(model.state_dict())
    model.use_autoencoder(KlAutoencoder.from_pretrained(tmp_path / "vae"))
    assert set(model.state_dict()) == weights
    targets = model.targets(shown)
    with torch.no_grad():
        latents = (vae.eval().encode(2 * shown - 1).latent_dist.mean - 0.25) * 0.5
        pixels = vae.decode(latents / 0.5 + 0.25).sample
    torch.testing.assert_close(targets[:, 0].view(3, 4, 2, 2), latents[:, :, :2, :2])
    torch.testing.assert_close(model.pictures(targets), (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert generate(model, Processor(), ["a red circle"], steps=2).shape == (1, 3, 32, 32)


def test_an_autoencoder_that_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    model = without_own()
    for call in (
        lambda: model.targets(pictures(1)),
        lambda: model.pictures(torch.zeros(1, 64, 16)),
        lambda: noise_for(model, [0]),
    ):
        with pytest.raises(ValueError, match=r"model 'tiny' needs an autoencoder: give one to use_autoencoder"):
            call()
    other = Autoencoder(AutoencoderConfig(image_size=32, channels=3, halvings=1, width=8))
    with pytest.raises(ValueError, match=r"latents, 3 x 16 x 16, must be 8 x 8 patches of 16 values"):
        model.use_autoencoder(other)
    with pytest.raises(ValueError, match=r"takes no foreign autoencoder: it has its own autoencoder"):
        lively_model("vae").use_autoencoder(other)
    with pytest.raises(ValueError, match=r"takes no foreign autoencoder: it makes pixels"):
        lively_model("pixels").use_autoencoder(other)


def test_a_foreign_autoencoders_folder_is_checked(tmp_path: Path) -> None:
    vae = foreign()
    from blip3o.kl_autoencoder import KlAutoencoder

    with pytest.raises(FileNotFoundError, match=r"autoencoder's folder .*nowhere does not exist"):
        KlAutoencoder.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a pickle, which may run any code"):
        KlAutoencoder.from_pretrained(tmp_path / "pickled")
    vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match=r"vae\.config\.latents_mean must be None"):
        KlAutoencoder(vae)
    vae.register_to_config(scaling_factor=0.0)
    with pytest.raises(ValueError, match=r"scaling_factor must be a number above 0, got 0\.0"):
        KlAutoencoder(vae)
