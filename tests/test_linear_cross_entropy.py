"""linear_cross_entropy beyond the tests of all ops: memory, chunks, autocast, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import bound, evaluate, expectation, violations
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from blip3o_kernels import linear_cross_entropy, logits, use
from blip3o_kernels.native_ops import linear_cross_entropy as native
from blip3o_kernels.ops import linear_cross_entropy as contract

OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


def arguments(rows: int = 40, width: int = 24, vocab: int = 301, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(vocab, width, generator=generator)).requires_grad_()
    target = torch.randint(vocab, (rows,), generator=generator)
    return x, weight, target.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 16 rows, no logits kept."""
    monkeypatch.setattr(logits, "MIN_ROWS", 1)
    monkeypatch.setitem(logits.LOGITS, "cpu", 1)
    monkeypatch.setattr(native, "KEPT", 0)
    yield


def test_chunk_rows() -> None:
    """As few chunks as fit, all of about one size, whatever the number of threads; never no row."""
    for rows, vocab, expected in ((2048, 8192, 512), (3000, 8192, 512), (1, 5, 16), (0, 5, 16), (4096, 151668, 256)):
        assert logits.chunk_rows(rows, vocab, "cpu") == expected
    for rows in (1, 100, 5000, 100_000):
        for vocab in (2, 1000, 151668):
            step = logits.chunk_rows(rows, vocab, "cpu")
            assert step * vocab <= max(logits.LOGITS["cpu"], logits.MIN_ROWS * vocab) + 16 * vocab


def test_reference_is_cross_entropy_of_the_logits() -> None:
    x, weight, target = arguments()
    table = 5.0 * torch.tanh(F.linear(x, weight) / 5.0)
    expected = F.cross_entropy(table, target, label_smoothing=0.1)
    expected = expected + 1e-3 * table.logsumexp(-1)[target != -100].square().mean()
    torch.testing.assert_close(contract.reference(x, weight, target, **OPTIONS), expected)


def test_many_chunks(small_chunks: None) -> None:
    """The same loss and gradients as in one chunk: sums of chunks, with the mean over all of them."""
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        results = []
        for backend in ("reference", "native", "native:avx2"):
            x, weight, target = arguments(rows=70)
            x.requires_grad_(wanted[0])
            weight.requires_grad_(wanted[1])
            with use(backend):
                loss = linear_cross_entropy(x, weight, target, **OPTIONS)
            if any(wanted):
                (3 * loss).backward()
            results.append((loss.detach(), x.grad, weight.grad))
        for expected, *others in zip(*results, strict=True):
            for got in others:
                assert (got is None) == (expected is None)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an op inside the block returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // 4 for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_are_never_whole(small_chunks: None) -> None:
    x, weight, target = (tensor.detach() for tensor in arguments(rows=500, width=8, vocab=1000))
    for wanted in (False, True):
        with Largest() as seen:
            native.forward(x, weight, target, -100, 0.1, 0.0, 0.0, None, wanted, wanted)
        assert seen.elements == max(16 * 1000, *(tensor.numel() for tensor in (x, weight)))
    if native.late(torch.bfloat16, 1, True, None):  # 128 rows and 32 words, and gradients of 1024 words, at a time
        x, weight, target = arguments(rows=2000, width=8, vocab=5000)
        with Largest() as seen:
            linear_cross_entropy(x.to(torch.bfloat16), weight.to(torch.bfloat16), target).backward()
        assert seen.elements < 2000 * 5000 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Products in autocast's dtype, forward and backward, as close to the truth as the reference's."""
    x, weight, target = arguments(rows=200, width=64)
    truth = None
    errors: dict[str, list[Tensor]] = {}
    for backend in ("none", "reference", "native"):
        x.grad = weight.grad = None
        with use("reference" if backend == "none" else backend):
            with torch.autocast("cpu", dtype, enabled=backend != "none"):
                loss = linear_cross_entropy(x, weight, target, **OPTIONS)
        assert loss.dtype is torch.float32
        loss.backward()
        got = [loss.detach(), x.grad, weight.grad]
        truth = truth or got
        errors[backend] = [
            (a - b).square().mean().sqrt() / b.square().mean().sqrt() for a, b in zip(got, truth, strict=True)
        ]
    for ours, reference in zip(errors["native"], errors["reference"], strict=True):
        assert 0 < ours < 1.5 * reference + 1e-6
    # and it is autocast's dtype that decides, not what surrounds the products
    with use("native"), torch.autocast("cpu", dtype):
        again = linear_cross_entropy(x.detach(), weight.detach(), target, **OPTIONS)
    assert torch.equal(again, loss.detach())


def test_errors_name_the_argument() -> None:
    x, weight, target = arguments()
    for words, options in (
        (r"label_smoothing: expected a number in \[0, 1\), got 1.0", {"label_smoothing": 1.0}),
        ("z_loss: expected a finite number >= 0, got -1", {"z_loss": -1}),
        ("z_loss: expected a finite number >= 0, got nan", {"z_loss": float("nan")}),
        ("softcap: expected a finite number > 0, or None, got 0", {"softcap": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(x, weight, target, **options)
    with pytest.raises(ValueError, match=r"weight: expected shape \[V, 24\] with V > 0, got \[0, 24\]"):
        linear_cross_entropy(x, weight[:0], target)
    with pytest.raises(ValueError, match=r"target: expected shape \[40\]"):
        linear_cross_entropy(x, weight, target[1:])
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        linear_cross_entropy(x, weight.double(), target)
    with pytest.raises(ValueError, match="weight: expected the device of x"):
        linear_cross_entropy(x, weight.to("meta"), target)


def test_a_target_outside_the_vocabulary() -> None:
    x, weight, target = arguments()
    for wrong in (301, -1, -101):
        target[7] = wrong
        for backend in ("reference", "native"):
            with use(backend), pytest.raises(IndexError, match=rf"target: expected values in \[0, 301\).*got {wrong}"):
                linear_cross_entropy(x, weight, target)
        with pytest.raises(IndexError, match="target: expected"):
            torch.ops.blip3o.linear_cross_entropy(
                x, weight, target, True, True, -100, 0.0, 0.0, 0.0, None, False, "native"
            )


def test_infinite_logits() -> None:
    """NaN and infinity reach the loss, as in the reference."""
    x, weight, target = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [-float("inf")]]), torch.tensor([1])
    for value in (-float("inf"), float("inf"), float("nan"), 1e38):
        weight[2] = value
        with use("native"):
            got = linear_cross_entropy(x, weight, target)
        torch.testing.assert_close(got, contract.reference(x, weight, target), equal_nan=True)


def test_linear_cross_entropy_without_targets() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(5, 4), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and not x.grad.any()


def test_compile_under_autocast() -> None:
    """Autocast is decided where the call stands, in a changing shape."""

    def step(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x * 2, weight, target, softcap=5.0)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (40, 20, 33):
        x, weight, target = arguments(rows)
        got, expected = compiled(x, weight, target), step(x, weight, target)
        torch.testing.assert_close(got, expected)
        for mine, eager in zip(
            torch.autograd.grad(2 * got, (x, weight)), torch.autograd.grad(2 * expected, (x, weight)), strict=True
        ):
            torch.testing.assert_close(mine, eager)


def test_flops() -> None:
    x, weight, target = arguments()
    with FlopCounterMode(display=False) as counter, use("native"):
        linear_cross_entropy(x.detach(), weight, target).backward()
    late = native.late(x.dtype, 0, True, None)
    assert counter.get_total_flops() == 2 * 2 * 40 * 24 * 301 + (0 if late else 301 * 24)


def test_a_retained_graph_gives_gradients_again() -> None:
    x, weight, target = arguments()
    for late in (None, False, True):
        if late is None:
            loss = linear_cross_entropy(x, weight, target)
        elif not late or native.late(x.dtype, 0, True, None):
            call = torch.ops.blip3o.linear_cross_entropy
            loss = call(x, weight, target, True, True, -100, 0.0, 0.0, 0.0, None, late, "native")[0]
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
        assert torch.equal(second, 2 * first)
    call = torch.ops.blip3o.linear_cross_entropy
    unkept = call(x, weight, target, False, True, -100, 0.0, 0.0, 0.0, None, False, "native")
    with pytest.raises(RuntimeError, match="told not to keep"):
        unkept[0].backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_own_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which so few logits as a test has would not take."""
    monkeypatch.setattr(native, "MANY", dict.fromkeys(native.MANY, 0))
    assert native.late(dtype, 1, True, None) == (native.native.instruction_set() != "portable")
    op = contract.OP
    for sample in op.samples(dtype, "cpu"):
        given = bound(op, sample)
        with use("native"):
            got = evaluate(op, op.function, given)
        broken = list(violations(got, expectation(op, "native", given)))
        assert not broken, f"{sample.name}: {broken}"
