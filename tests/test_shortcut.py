"""The shortest way into the CPU library: taken where it may be, with the same bits, and never anywhere else."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conformance import bound, outputs_of, tensors_of, variants
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_kernels import OPS, layer_norm, native, rms_norm, use
from blip3o_kernels.dispatch import Op
from blip3o_kernels.samples import Draw
from blip3o_kernels.shortcut import _TABLE

pytestmark = pytest.mark.skipif(
    bool(native.CPU_MISSING) or not hasattr(Tensor, _TABLE),
    reason="needs the CPU library, and a torch that offers DLPack's exchange table (2.13 does)",
)


def module(op: Op) -> object:
    return importlib.import_module(f"blip3o_kernels.ops.{op.name}")


WITH = [op for op in OPS if hasattr(module(op), "_shortcut")]


@contextmanager
def shortcuts(op: Op, way: Callable[..., object]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(op), "_shortcut", way)
        yield


def watched(op: Op) -> tuple[Callable[..., object], list[bool]]:
    """The op's shortcut, and whether it was taken at each call."""
    real, taken = vars(module(op))["_shortcut"], []

    def way(*arguments: object) -> object:
        result = real(*arguments)
        taken.append(result is not None and result is not False)
        return result

    return way, taken


@pytest.mark.parametrize("op", WITH, ids=lambda op: op.name)
def test_both_ways_give_the_same(op: Op) -> None:
    """Bits, shapes, strides and dtypes, of every sample, on the best instruction set and on the portable one."""
    way, taken = watched(op)
    for backend in ("native", "native:portable"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for sample in variants(op, dtype):
                floats = any(x.is_floating_point() for x in tensors_of(bound(op, sample)).values())
                if dtype is torch.float64 and floats:  # no native body has these
                    continue
                with torch.no_grad(), use(backend):
                    with shortcuts(op, way):
                        found = outputs_of(op.function(*sample.args, **sample.kwargs))
                    with shortcuts(op, lambda *_: None):
                        expected = outputs_of(op.function(*sample.args, **sample.kwargs))
                for name, y in expected.items():
                    assert torch.equal(found[name], y), (sample.name, name)
                    assert found[name].stride() == y.stride() and found[name].dtype is y.dtype, (sample.name, name)
    assert sum(taken) > len(taken) / 6


@pytest.mark.parametrize(
    "heads, groups, tokens, keys", [(8, 2, 1, 700), (32, 1, 1, 40), (4, 4, 9, 300), (3, 3, 17, 20)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_attention(heads: int, groups: int, tokens: int, keys: int, dtype: torch.dtype) -> None:
    """Long caches, keys and values where they lie in one, other widths; up to 16 rows that share a key."""
    op, draw = next(op for op in OPS if op.name == "attention"), Draw(dtype, "cpu")
    way, taken = watched(op)
    key, value = draw(2, groups, keys + 3, 64)[:, :, :keys], draw(2, keys, groups, 40).transpose(1, 2)
    few = (heads // groups if tokens == 1 else tokens) <= 16
    for query in (draw(2, heads, tokens, 64), draw(2, tokens, heads, 64).transpose(1, 2)):
        for v in (value, key):
            for options in ({}, {"scale": 0.3}, {"is_causal": True, "scale": -1.0}):
                taken.clear()
                with torch.no_grad(), shortcuts(op, way):
                    found = op.function(query, key, v, enable_gqa=True, **options)
                with torch.no_grad(), shortcuts(op, lambda *_: None):
                    expected = op.function(query, key, v, enable_gqa=True, **options)
                assert taken == [few]
                assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 1), (2, 9)])
def test_attention_below_the_dispatcher(batch: int, tokens: int, dtype: torch.dtype) -> None:
    """As a compiled graph calls it: the log-sum-exp comes too. With a window or a mask it goes the ordinary way."""
    op, draw = next(op for op in OPS if op.name == "attention"), Draw(dtype, "cpu")
    way, taken = watched(op)
    query = draw(batch, tokens, 6, 32)[:, :, :4].transpose(1, 2)  # a part of a projection
    key, value = draw(batch, 2, 30, 32)[:, :, :25], draw(batch, 2, 30, 32)[:, :, :25]
    mask = torch.ones(tokens, 25, dtype=torch.bool).tril(9)
    ordinary = (None, None, None, True, -1, -1, 0.0, 0.3)
    for options in (ordinary, (mask, *ordinary[1:]), (*ordinary[:4], 3, -1, 0.0, 0.3), (*ordinary[:6], 5.0, 0.3)):
        taken.clear()
        results = []
        for shortcut in (way, lambda *_: None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module(op), "_saving_shortcut", shortcut)
                results.append(torch.ops.blip3o.attention(query, key, value, *options, "native"))
        assert taken == ([True] if options is ordinary else [])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
            assert found.shape == expected.shape and found.stride() == expected.stride()


def calls() -> dict[str, tuple[tuple[object, ...], dict[str, object]]]:
    """One ordinary call of each op."""
    draw = Draw(torch.float32, "cpu")
    x, condition, table = draw(2, 3, 8), draw(2, 8), draw(3, 4)
    return {
        "rms_norm": ((x, draw(8)), {}),
        "add_rms_norm": ((x, x, draw(8)), {}),
        "layer_norm": ((x, draw(8), draw(8)), {}),
        "modulate": ((x, condition), {"weight": draw(8)}),
        "gated_residual": ((x, x, condition), {"weight": draw(8)}),
        "rope": ((draw(2, 2, 3, 8), table, table), {}),
        "qk_norm_rope": ((draw(2, 2, 3, 8), draw(2, 1, 3, 8), draw(8), draw(8), table, table), {"norm": "layer"}),
        "swiglu": ((x,), {}),
        "timestep_embedding": ((draw(3), 8), {}),
        "flow_timesteps": ((torch.arange(3), 1), {}),
        "attention": ((draw(2, 1, 4, 8).transpose(1, 2), draw(2, 2, 5, 8), draw(2, 2, 5, 8)), {"enable_gqa": True}),
        "flow_step": ((x, x, 0.5), {"unconditional": x, "guidance": 2.0}),
    }


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


class Other(Tensor):
    pass


@pytest.mark.parametrize("op", WITH, ids=lambda op: op.name)
def test_only_the_ordinary_case_takes_it(op: Op) -> None:
    way, taken = watched(op)
    args, kwargs = calls()[op.name]
    first = args[0]
    assert isinstance(first, Tensor)

    def takes(*leading: object, **options: object) -> bool:
        taken.clear()
        op.function(*leading, **{**kwargs, **options})
        return any(taken)

    with shortcuts(op, way):
        assert takes(*args)
        assert takes(torch.nn.Parameter(first, requires_grad=False), *args[1:])
        for blocked in (Seeing(), torch.device("cpu"), use("reference"), forward_ad.dual_level()):
            with blocked:
                assert not takes(*args)
        assert not takes(first.as_subclass(Other), *args[1:])
        if op.differentiable:
            wanted = first.detach().clone().requires_grad_()
            assert not takes(wanted, *args[1:])
            with torch.no_grad():
                assert takes(wanted, *args[1:])
            assert not takes(torch._neg_view(first), *args[1:])
            torch.func.vmap(lambda x: x if takes(*args) else -x)(torch.ones(2))
            assert not any(taken)


def test_an_empty_key_and_one_of_zeros() -> None:
    """No key is ordinary. What torch knows to be zeros has no memory either, but elements."""
    op = next(op for op in OPS if op.name == "qk_norm_rope")
    way, taken = watched(op)
    (query, key, *rest), options = calls()[op.name]
    zeros = torch._efficientzerotensor
    with shortcuts(op, way):
        _, none = op.function(query, key[:, :0], *rest, **options)
        _, turned = op.function(query, zeros(key.shape), *rest, **options)
        op.function(query, key, rest[0], zeros(rest[1].shape), *rest[2:], **options)
        op.function(query, key, *rest, key_bias=zeros(rest[1].shape), **options)
    assert taken == [True, False, False, False]
    assert none.shape == (2, 0, 3, 8) and turned.shape == key.shape and not turned.any()


def test_compiled_it_does_not_exist() -> None:
    way, taken = watched(next(op for op in OPS if op.name == "rms_norm"))
    with shortcuts(next(op for op in OPS if op.name == "rms_norm"), way), torch.no_grad():
        x = torch.randn(2, 8)
        compiled = torch.compile(lambda x: rms_norm(x) + 1, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), rms_norm(x) + 1)
    assert len(taken) == 1  # the eager call's


@pytest.mark.parametrize("op", WITH, ids=lambda op: op.name)
def test_nothing_leaks(op: Op) -> None:
    """References to arguments, to what the shortcut knows, and results: after many calls as many as before."""
    args, kwargs = calls()[op.name]
    strange = (torch.randn(3, 5, 7).double(), *args[1:])

    def once() -> None:
        op.function(*args, **kwargs)
        vars(module(op))["_shortcut"](0, *strange)

    def counted() -> list[int]:
        gc.collect()
        known = (*args, None, True, False, Tensor, torch.empty_like, torch.get_num_threads, "requires_grad")
        return [sys.getrefcount(x) for x in known]

    runs = [torch.no_grad()(once)]
    if op.name == "layer_norm":  # its backward pass has a shortcut too
        dy, saved = torch.ones_like(args[0]), torch.ones(12)  # type: ignore[arg-type]
        runs.append(torch.no_grad()(lambda: module(op)._backward_shortcut(0, dy, *args, saved)))  # type: ignore[attr-defined]
    for run in runs:
        run()
        changes, before = [], counted()
        for _ in range(3):  # what changes by itself, as None does when others' garbage goes, does so once
            for _ in range(500):
                run()
            after = counted()
            changes.append([abs(a - b) for a, b in zip(after, before, strict=True)])
            before = after
        assert max(min(of_one) for of_one in zip(*changes, strict=True)) < 50


@pytest.mark.parametrize("op", WITH, ids=lambda op: op.name)
def test_a_finaliser_that_changes_an_input(op: Op) -> None:
    """Garbage may be collected wherever Python allocates, and a finaliser may do anything: here it makes a tensor's
    shape and strides lie elsewhere, and frees where they were."""
    args, kwargs = calls()[op.name]
    expected = outputs_of(op.function(*args, **kwargs))

    class Garbage:
        def __init__(self, tensors: list[Tensor]) -> None:
            self.itself, self.tensors = self, tensors

        def __del__(self) -> None:
            for x in self.tensors:
                while x.dim() < 8:
                    x.unsqueeze_(0)

    thresholds = gc.get_threshold()
    for _ in range(50):
        own = [x.clone() if isinstance(x, Tensor) else x for x in args]
        gc.disable()
        Garbage([x for x in own if isinstance(x, Tensor)])
        gc.set_threshold(1, 1, 1)
        gc.enable()
        try:
            for name, y in outputs_of(op.function(*own, **kwargs)).items():
                assert torch.equal(y.view_as(expected[name]), expected[name])
        except ValueError:  # it ran so early that the checks saw what it did
            pass
        finally:
            gc.set_threshold(*thresholds)


def test_numbers_that_are_none() -> None:
    """The ordinary way's errors, also behind arguments that the shortcut takes."""
    x = torch.randn(2, 8)
    for eps in (-1.0, float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="eps"):
            rms_norm(x, None, eps)
    with pytest.raises(TypeError, match="eps"):
        layer_norm(x, None, None, torch.tensor(1e-5))  # type: ignore[arg-type]
    torch.testing.assert_close(layer_norm(x, None, None, 1), layer_norm(x, None, None, 1.0), rtol=0, atol=0)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(7))


def test_results_know_their_memory() -> None:
    """They are torch's own: they grow in place, as do those of torch's functions."""
    y = rms_norm(torch.randn(2, 8))
    assert y.resize_(100).shape == (100,)
    assert y.untyped_storage().resizable()


def test_other_threads_of_python_go_on_meanwhile() -> None:
    """A large op does not hold Python's lock: a thread that only counts gets far while it runs."""
    x, counted, stop = torch.randn(4096, 4096), [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    def rate(call: Callable[[], object]) -> float:
        start, begin = counted[0], time.perf_counter()
        call()
        return (counted[0] - start) / (time.perf_counter() - begin)

    before, interval = rms_norm(x), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # after the call the lock is soon back with this thread, which counts no more
    thread = threading.Thread(target=count)
    thread.start()
    try:
        alone = rate(lambda: time.sleep(0.05))
        beside = max(rate(lambda: rms_norm(x)) for _ in range(20))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert torch.equal(before, rms_norm(x))
    assert beside > 0.3 * alone
