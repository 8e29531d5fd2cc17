"""Large results live in memory that was another result's before: never while anything holds that one."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
from torch import Tensor

from blip3o_kernels import (
    add_rms_norm,
    keep_results,
    kept_results,
    memory,
    native,
    qk_norm_rope,
    release_results,
    rms_norm,
    rope,
    swiglu,
)

pytestmark = pytest.mark.skipif(bool(native.CPU_MISSING), reason=native.CPU_MISSING)
MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()
    release_results()
    yield
    keep_results(memory.KEPT)


def result(value: float = 1.0, mib: int = 1) -> Tensor:
    """`mib` MiB of `value`."""
    return rms_norm(torch.ones(mib * 256, 1024), torch.full((1024,), value), eps=0.0)


def exported(y: Tensor) -> object:
    """What `ctypes` knows of the memory alone, through an array of NumPy."""
    array = y.numpy()
    return array.reshape(-1).view(numpy.uint8)


def graph(y: Tensor) -> Tensor:
    """A scalar whose graph has saved y and nothing else has."""
    factor = torch.ones(y.shape[-1], requires_grad=True)
    return (y * factor).sum()


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda y: y,
    "detached": lambda y: y.detach(),
    "data": lambda y: y.data,
    "view": lambda y: y[3:5].t()[7],
    "other dtype": lambda y: y.view(torch.int32),
    "empty view": lambda y: y[:0],
    "storage": lambda y: y.untyped_storage(),
    "set_": lambda y: torch.empty(0).set_(y.untyped_storage(), 5, (2, 3)),
    "numpy": lambda y: y.numpy(),
    "numpy view": exported,
    "memoryview": lambda y: memoryview(y.numpy())[3:],
    "dlpack": lambda y: torch.from_dlpack(y),
    "capsule": lambda y: torch.utils.dlpack.to_dlpack(y),
    "array of dlpack": lambda y: numpy.from_dlpack(y),
    "parameter": lambda y: torch.nn.Parameter(y),
    "graph": graph,
    "chain of views": lambda y: y.view(-1).unfold(0, 4, 2).select(0, 1).expand(3, 4),
    "closure": lambda y: lambda: y,
    "cycle": lambda y: (lambda cell: cell.append((cell, y)) or cell)([]),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_held_memory_is_not_reused(kind: str) -> None:
    y = result(2.0)
    place = y.data_ptr()
    held = HOLDERS[kind](y)
    del y
    assert kept_results() == 0
    others = [result(3.0) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    seen = (ctypes.c_float * (MIB // 4)).from_address(place)
    assert numpy.ptp(numpy.frombuffer(seen, numpy.float32)) == 0 and seen[0] == 2.0
    del held
    gc.collect()
    assert kept_results() == MIB
    assert result(4.0).data_ptr() == place


def test_a_weak_reference_holds_nothing() -> None:
    y = result()
    place, reference = y.data_ptr(), weakref.ref(y)
    storage = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    assert reference() is None and storage.expired()
    assert result().data_ptr() == place


def test_results_are_ordinary_tensors() -> None:
    y = result(2.0)
    expected = torch.full((256, 1024), 2.0)
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.is_contiguous()
    assert y.is_leaf and not y.requires_grad and not y.is_inference() and not y.is_shared() and y._version == 0
    y.add_(1).requires_grad_()
    assert torch.equal(copy.deepcopy(y), expected + 1)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected + 1)
    with torch.inference_mode():
        assert result().is_inference()
    x = torch.ones(256, 1024, requires_grad=True)
    y = rms_norm(x)
    y.mul_(2)  # no view: autograd would forbid it
    y.sum().backward()
    assert y._base is None and x.grad is not None and x.grad.data_ptr() != y.data_ptr()
    with pytest.raises(RuntimeError, match="not resizable"):
        result().resize_(512, 1024)
    y = result().resize_(2, 3)
    assert y.shape == (2, 3)


def test_layouts_are_those_of_torch() -> None:
    x = torch.randn(2, 300, 4, 256).transpose(1, 2)
    angles = torch.randn(300, 128)
    y = rope(x, angles.cos(), angles.sin())
    assert y.nbytes >= memory.LARGE and y.stride() == torch.empty_like(x).stride()
    query, key = qk_norm_rope(x, x, torch.ones(256), torch.ones(256), angles.cos(), angles.sin())
    assert query.stride() == key.stride() == x.stride()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
        y = memory.empty((3, 1, 500, 700), dtype)
        assert y.dtype is dtype and y.shape == (3, 1, 500, 700) and y.is_contiguous() and y.data_ptr() % 64 == 0
        y.fill_(3)
        for z in (y, y.transpose(1, 2), y.permute(3, 1, 0, 2), y[:, :, ::2], y.expand(3, 2, 500, 700)):
            assert memory.empty_like(z).stride() == torch.empty_like(z).stride()
    assert memory.empty((1,) * 20 + (MIB,), torch.float32).shape[-1] == MIB
    with pytest.raises(RuntimeError):  # torch's own error
        memory.empty((2**45,), torch.float32)


def test_small_results_are_torchs() -> None:
    assert memory.empty_like(torch.empty(MIB // 4 - 1)).untyped_storage().resizable()
    assert memory.empty((MIB // 4 - 1,), torch.float32).untyped_storage().resizable()
    assert not memory.empty_like(torch.empty(MIB // 4)).untyped_storage().resizable()


def test_what_is_kept_is_bounded() -> None:
    results = [result(mib=mib) for mib in (1, 2, 3, 4)]
    keep_results(6 * MIB)
    youngest = results[-1].data_ptr()
    while results:
        del results[0]  # the oldest leave first
        assert kept_results() <= 6 * MIB
    assert kept_results() == 4 * MIB
    assert result(mib=4).data_ptr() == youngest
    assert release_results() == 4 * MIB and kept_results() == 0
    y = result(mib=7)
    del y
    assert kept_results() == 0  # larger than what may be kept
    y = result(2.0)
    del y
    keep_results(0)
    assert kept_results() == 0
    y = result(2.0)
    del y
    assert kept_results() == 0 and release_results() == 0
    with pytest.raises(ValueError, match="limit: expected a number of bytes >= 0, got -1"):
        keep_results(-1)


def test_only_sizes_that_differ_little_share_memory() -> None:
    y = torch.empty_like(memory.empty((16 * MIB,), torch.float32))
    del y
    y = memory.empty((16 * MIB,), torch.float32)
    place = y.data_ptr()
    del y
    assert memory.empty((8 * MIB,), torch.float32).data_ptr() != place
    assert memory.empty((17 * MIB,), torch.float32).data_ptr() != place
    assert memory.empty((16 * MIB - 1000,), torch.float32).data_ptr() == place


class Juggler:
    """Computes large results, holds them in every way there is, drops them in any order, and looks at all of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = ((256, 1024), (264, 1024), (520, 1024))
        self.inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        self.weight = torch.rand(1024, generator=generator)
        memory_of_torch = [self.compute(i, kind) for i in range(3) for kind in range(4)]
        self.expected = [[y.clone() for y in ys] for ys in memory_of_torch]
        self.held: list[tuple[Callable[[], Tensor], Tensor]] = []

    def compute(self, i: int, kind: int) -> tuple[Tensor, ...]:
        x = self.inputs[i]
        if kind == 0:
            return (rms_norm(x, self.weight),)
        if kind == 1:
            return add_rms_norm(x, x.flip(0), self.weight)
        leaf = x.detach().requires_grad_()
        if kind == 2:
            y = swiglu(leaf, x)
            return y.detach(), *torch.autograd.grad(y.square().sum(), leaf)
        y = rms_norm(swiglu(rms_norm(leaf, self.weight), x), self.weight)  # saved in the graph of one another
        return y.detach(), *torch.autograd.grad(y, leaf, x)

    def hold(self, y: Tensor, expected: Tensor) -> None:
        how = self.random.randrange(6)
        if how == 0:
            self.held.append((lambda: y, expected))
        elif how == 1:
            row = y[7:9]
            self.held.append((lambda: row, expected[7:9]))
        elif how == 2:
            array = y.numpy()[:, ::3]
            self.held.append((lambda: torch.from_numpy(array), expected[:, ::3]))
        elif how == 3:
            storage = y.untyped_storage()
            self.held.append((lambda: torch.empty(0).set_(storage).view(expected.shape), expected))
        elif how == 4:
            array = numpy.from_dlpack(y.t())
            self.held.append((lambda: torch.from_dlpack(array), expected.t()))
        else:
            shift = torch.zeros((), requires_grad=True)
            product = y * (shift + 1)  # its graph holds y
            self.held.append((lambda: torch.autograd.grad(product, shift, expected, retain_graph=True)[0],
                              (expected * expected).sum()))  # fmt: skip

    def step(self) -> None:
        i, kind = self.random.randrange(3), self.random.randrange(4)
        for y, expected in zip(self.compute(i, kind), self.expected[4 * i + kind], strict=True):
            assert torch.equal(y, expected)
            if self.random.random() < 0.6:
                self.hold(y, expected)
        while self.held and self.random.random() < (0.4 if len(self.held) < 20 else 0.9):
            self.held.pop(self.random.randrange(len(self.held)))
        if self.random.random() < 0.05:
            release_results()

    def check(self) -> None:
        for found, expected in self.held:
            if expected.dim():
                assert torch.equal(found(), expected)
            else:
                torch.testing.assert_close(found(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_random_lives(seed: int) -> None:
    juggler = Juggler(seed)
    keep_results((0, 2 * MIB, 16 * MIB, memory.KEPT)[seed])
    for _ in range(60):
        juggler.step()
        juggler.check()


def test_threads_share_what_is_kept() -> None:
    """Results are made in one thread and dropped in another, too."""
    failures: list[BaseException] = []
    passed: list[tuple[Callable[[], Tensor], Tensor]] = []
    keep_results(24 * MIB)

    def work(seed: int) -> None:
        try:
            juggler = Juggler(seed)
            for _ in range(40):
                juggler.step()
                juggler.check()
                if juggler.held:
                    passed.append(juggler.held.pop())
                if len(passed) > 8:
                    juggler.held.append(passed.pop(0))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kept_results() <= 24 * MIB


def test_shared_memory_and_a_fork() -> None:
    """A result moved to shared memory leaves its own; a child reuses its copy of what is kept, and nobody else's."""
    shared, mine, kept = result(2.0), result(3.0), result(4.0)
    place = shared.data_ptr()
    shared.share_memory_()
    assert shared.data_ptr() != place and kept_results() == MIB
    del kept
    child = os.fork()
    if not child:
        good = torch.equal(result(5.0), torch.full((256, 1024), 5.0)) and bool((mine == 3).all())
        shared.fill_(6.0)
        another = [result(7.0) for _ in range(4)]
        os._exit(0 if good and all(bool((y == 7).all()) for y in another) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((mine == 3).all()) and bool((shared == 6).all())
    again = [result(8.0) for _ in range(3)]
    assert bool((mine == 3).all()) and bool((shared == 6).all()) and all(bool((y == 8).all()) for y in again)


def test_gradients_are_the_same_bits() -> None:
    def train() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 1024, generator=generator, requires_grad=True)
        weight = torch.rand(1024, generator=generator).requires_grad_()
        for _ in range(3):
            y = x
            for _ in range(3):
                y = swiglu(rms_norm(y, weight), y)
            y.square().sum().backward()
        assert x.grad is not None and weight.grad is not None
        return [x.grad, weight.grad]

    kept = train()
    assert kept_results() > 0
    keep_results(0)
    for one, other in zip(kept, train(), strict=True):
        assert torch.equal(one, other)
