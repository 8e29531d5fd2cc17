"""Counter-based noise: the published words, the same bits on every backend, and nothing that depends on the batch.

The Triton bodies take part when TRITON_INTERPRET=1; the last test starts this file that way.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from blip3o_kernels import flow_interpolate, flow_timesteps, native, philox, triton_ops, use
from blip3o_kernels.dispatch import INSTRUCTION_SETS

ROOT = Path(__file__).parents[1]
SETS = tuple(name for name in INSTRUCTION_SETS if name)
BACKENDS = ["reference", *(f"native:{name}" for name in SETS[: SETS.index(native.instruction_set() or "portable") + 1])]
if not triton_ops.CPU_MISSING:
    BACKENDS.append("triton")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FAR = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -1])
SEED = 2**63 + 2**32 + 12345


def test_published_words() -> None:
    """Random123's known answers for philox4x32-10."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
        assert tuple(int(word) for word in philox.philox4x32((c0, c1, c2, c3), key)) == expected


def test_counter() -> None:
    """Element, position, stream, draw and seed stand where philox.py says; the third known answer, as a sample's."""
    words = philox.bits(torch.tensor([0x13198A2E << 32 | 0x85A308D3]), 7, 0x299F31D0A4093822, 0x03, 0x707344)
    first = [
        philox.philox4x32(tuple(map(torch.tensor, (i, 0x85A308D3, 0x13198A2E, 0x03707344))), (0xA4093822, 0x299F31D0))
        for i in (0, 1)
    ]
    assert words.tolist() == [[int(word) for four in first for word in four][:7]]
    assert torch.equal(philox.bits(FAR, 5, 1, 0), philox.bits(FAR, 8, 1, 0)[:, :5])
    several = [
        philox.bits(FAR, 8, seed, stream, draw)
        for seed, stream, draw in ((1, 0, 0), (2, 0, 0), (1 << 32, 0, 0), (1, 1, 0), (1, 0, 1))
    ]
    assert len(torch.cat(several).unique()) == 5 * 64


def test_uniform() -> None:
    """Inside (0, 1) for every word, symmetric, and the same in float32 and float64."""
    words = torch.tensor([0, 511, 512, 2**31, 2**32 - 512, 2**32 - 1])
    u = philox.uniform(words)
    assert u.tolist() == [2**-24, 2**-24, 3 * 2**-24, 0.5 + 2**-24, 1 - 2**-24, 1 - 2**-24]
    assert torch.equal(u.double(), philox.uniform(words, torch.float64))
    assert philox.normal(torch.zeros(2, dtype=torch.int64))[0] == pytest.approx(math.sqrt(48 * math.log(2)))


def test_moments() -> None:
    """Mean, variance, skewness and kurtosis, and no correlation between the two of a pair or between samples."""
    n = philox.noise(torch.arange(64), (4096,), 3, 0, torch.float64)
    count = n.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(n.pow(power).mean() - expected) < 5 * math.sqrt(variance / count)
    for one, other in ((n[:, 0::2], n[:, 1::2]), (n[:-1], n[1:]), (n[:, :-1], n[:, 1:]), (n[:, :-4], n[:, 4:])):
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


def drawn(positions: Tensor, elements: int, draw: int = 0) -> Tensor:
    """The noise as an op draws it: of data 0 the velocity is the noise."""
    zeros = torch.zeros(len(positions), elements)
    x_sigma, velocity = flow_interpolate(
        zeros, None, torch.ones(len(positions)), seed=SEED, positions=positions, draw=draw
    )
    assert torch.equal(x_sigma, velocity)
    return velocity


@every_backend
def test_bits(backend: str) -> None:
    """Uniform levels are the words themselves: equal to the last bit; and so equal in key, positions and draw."""
    for draw in (0, 2**24 - 1):
        words = philox.bits(FAR, 1, SEED, philox.STREAMS["timesteps"], draw)
        with use(backend):
            sigma = flow_timesteps(FAR, SEED, draw=draw)
        assert torch.equal((sigma.double() * 2**24).long(), (words[:, 0] >> 9) * 2 + 1)


@every_backend
def test_normals(backend: str) -> None:
    """Within NORMAL_ULPS of the exact values; and from the same words, which the angle of a pair gives away."""
    elements = 1790 if backend == "triton" else 40001
    words = philox.bits(FAR, elements + elements % 2, SEED, philox.STREAMS["noise"], 5)
    exact = philox.normal(words, torch.float64)[:, :elements]
    with use(backend):
        noise = drawn(FAR, elements, draw=5)
    ulp = 2.0 ** (exact.abs().clamp_min(1).log2().floor() - 23)
    assert ((noise - exact).abs() / ulp).max() <= philox.NORMAL_ULPS
    pairs = noise[:, : elements // 2 * 2].double()
    turns = torch.atan2(pairs[:, 1::2], pairs[:, 0::2]) / (2 * math.pi) % 1
    assert torch.equal((turns * 2**23).floor().long(), (words[:, 1 : elements // 2 * 2 : 2] >> 9))


@every_backend
def test_batches_do_not_matter(backend: str) -> None:
    """Drawn whole or in pieces, in any order: the same bits, forward and backward."""
    positions = torch.arange(2**32 - 3, 2**32 + 4)
    x, upstream = torch.randn(2, 7, 3, 11, generator=torch.Generator().manual_seed(0))
    options = {"distribution": "logit_normal", "shift": 3.0, "draw": 2}

    def run(places: Tensor) -> tuple[Tensor, ...]:
        rows = places - int(positions[0])
        level = flow_timesteps(places, SEED, **options)  # type: ignore[arg-type]
        data, sigma = x[rows].requires_grad_(), level.clone().requires_grad_()
        x_sigma, velocity = flow_interpolate(data, None, sigma, seed=SEED, positions=places)
        loss = (x_sigma * upstream[rows]).sum() + (velocity * upstream[rows]).sum()
        return level, x_sigma.detach(), velocity.detach(), *torch.autograd.grad(loss, (data, sigma))

    with use(backend):
        whole = run(positions)
        pieces = [run(piece) for piece in (*positions.split((1, 4, 2)), positions.flip(0))]
    for name, i in (("sigma", 0), ("x_sigma", 1), ("velocity", 2), ("dx", 3), ("dsigma", 4)):
        if backend == "reference" and name in ("sigma", "dsigma"):  # torch's own functions round by a vector's place
            close = torch.testing.assert_close
            close(torch.cat([piece[i] for piece in pieces[:-1]]), whole[i])
            continue
        assert torch.equal(torch.cat([piece[i] for piece in pieces[:-1]]), whole[i]), name
        assert torch.equal(pieces[-1][i].flip(0), whole[i]), name


@every_backend
def test_drawn_is_as_given(backend: str) -> None:
    positions, elements = torch.tensor([5, 2**33]), 1153
    x, upstream = torch.randn(2, 2, elements, generator=torch.Generator().manual_seed(0))
    results = []
    with use(backend):
        noise = drawn(positions, elements)
        for arguments in ({"noise": noise}, {"noise": None, "seed": SEED, "positions": positions}):
            data, sigma = x.clone().requires_grad_(), torch.tensor([0.3, 0.9]).requires_grad_()
            x_sigma, velocity = flow_interpolate(data, sigma=sigma, **arguments)  # type: ignore[arg-type]
            gradients = torch.autograd.grad((x_sigma * upstream).sum(), (data, sigma))
            results.append((x_sigma.detach(), velocity.detach(), *gradients))
    assert all(torch.equal(given, own) for given, own in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["native", None])
def test_compile(backend: str | None) -> None:
    """No graph break, and one graph for every draw: drawing is an opaque op, forced or not."""

    def step(x: Tensor, positions: Tensor, draw: int) -> Tensor:
        sigma = flow_timesteps(positions, 7, distribution="logit_normal", draw=draw)
        x_sigma, velocity = flow_interpolate(x * 2, None, sigma, seed=7, positions=positions, draw=draw)
        return (x_sigma * velocity).sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for draw in (2, 3, 5, 6):
        x, positions = torch.randn(4, 24, requires_grad=True), torch.arange(4) + draw
        expected = step(x, positions, draw)
        with use(backend) if backend else nullcontext():
            got = compiled(x, positions, draw)
        assert torch.equal(got, expected)
        assert torch.equal(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])
    assert counter.frame_count == 2  # the second one takes draw as a symbol


def test_levels() -> None:
    """The two distributions and the shift, as their formulae say; float64 of the reference is close."""
    positions = torch.arange(20000)
    uniform = flow_timesteps(positions, 1)
    assert abs(uniform.mean() - 0.5) < 0.01 and uniform.min() > 0 and uniform.max() < 1
    normal = flow_timesteps(positions, 1, distribution="logit_normal", mean=0.5, std=2.0).double().logit()
    assert abs(normal.mean() - 0.5) < 0.06 and abs(normal.std() - 2.0) < 0.05
    torch.testing.assert_close(flow_timesteps(positions, 1, shift=3.0), 3 * uniform / (1 + 2 * uniform))
    assert not torch.equal(uniform, flow_timesteps(positions, 1, draw=1))
    noise = drawn(positions[:100], 1)[:, 0]
    level = flow_timesteps(positions[:100], SEED, distribution="logit_normal").logit()
    assert abs((noise * level).mean()) < 0.5 and not torch.allclose(noise, level)


def test_errors_name_the_argument() -> None:
    x, sigma, places = torch.randn(2, 3), torch.rand(2), torch.arange(2)
    for error, message, arguments in (
        (ValueError, "seed: expected an int, because noise is None", {"positions": places}),
        (ValueError, "positions: expected an int64 tensor", {"seed": 1}),
        (TypeError, "positions: expected an int64 tensor, got torch.int32", {"seed": 1, "positions": places.int()}),
        (ValueError, r"positions: expected shape \[2\], got \[1\]", {"seed": 1, "positions": places[:1]}),
        (ValueError, "positions: expected the device of x", {"seed": 1, "positions": places.to("meta")}),
        (TypeError, "seed: expected an int, got float", {"seed": 1.0, "positions": places}),
        (ValueError, "seed: expected 0 <= seed < 2.64, got -1", {"seed": -1, "positions": places}),
        (ValueError, "seed: expected 0 <= seed < 2.64", {"seed": 2**64, "positions": places}),
        (ValueError, "draw: expected 0 <= draw < 2.24", {"seed": 1, "positions": places, "draw": 2**24}),
        (ValueError, "seed: expected none beside noise", {"noise": x, "seed": 0}),
        (ValueError, "positions: expected none beside noise", {"noise": x, "positions": places}),
        (ValueError, "draw: expected none beside noise", {"noise": x, "draw": 1}),
    ):
        for backend in ("reference", "native"):
            with use(backend), pytest.raises(error, match=message):
                flow_interpolate(**{"x": x, "noise": None, "sigma": sigma, **arguments})  # type: ignore[arg-type]
    for error, message, arguments in (
        (TypeError, "positions: expected an int64", {"positions": sigma}),
        (ValueError, r"positions: expected shape \[B\]", {"positions": places.view(2, 1)}),
        (ValueError, "distribution: expected 'uniform' or 'logit_normal', got 'cosine'", {"distribution": "cosine"}),
        (ValueError, "mean: expected a finite number", {"mean": math.nan}),
        (ValueError, "std: expected a positive", {"std": 0.0}),
        (ValueError, "shift: expected a positive", {"shift": -1.0}),
        (TypeError, "draw: expected an int", {"draw": True}),
        (ValueError, "seed: expected 0", {"seed": -1}),
    ):
        with pytest.raises(error, match=message):
            flow_timesteps(**{"positions": places, "seed": 1, **arguments})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream: expected 0 <= stream < 256"):
        philox.bits(places, 4, 1, 256)


@pytest.mark.skipif(find_spec("triton") is None, reason='needs triton: pip install "blip3o[triton]"')
@pytest.mark.skipif(triton_ops.INTERPRETED, reason="runs in the interpreter already")
def test_triton_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_philox.py", "-k", "[triton]"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout + run.stderr
