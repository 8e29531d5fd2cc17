"""Every op wherever its inputs lie and whatever they hold: any strides and offsets, rows 2^30 elements apart, random
shapes, infinities and NaN; and the same bits every time, on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conformance import bound, evaluate, expectation, floating, outputs_of, tensors_of, variants, violations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_calls import CALLS, Draw
from torch import Tensor

from blip3o_kernels import OPS, flow_interpolate, flow_loss, layer_norm, native, triton_ops, use
from blip3o_kernels.dispatch import INSTRUCTION_SETS, Op
from blip3o_kernels.samples import Sample


def runs() -> Iterator[tuple[Op, str]]:
    """Each op on each backend of this process: Triton's if it is interpreted, then alone, otherwise native's."""
    for op in OPS:
        names = {body.backend for body in op.bodies if body.device == "cpu" and not body.missing}
        if triton_ops.INTERPRETED:
            yield from ((op, name) for name in names & {"triton"})
        elif "native" in names:
            best = INSTRUCTION_SETS[native.instruction_set()]
            yield from ((op, f"native:{name}") for name, code in INSTRUCTION_SETS.items() if 0 < code <= best)


# torch's matrix products sum in another order where a matrix is transposed.
PRODUCTS_OF_TORCH = {"linear_cross_entropy"}
RUNS = [pytest.param(op, backend, id=f"{op.name}-{backend}") for op, backend in runs()]


def run(op: Op, backend: str, arguments: dict[str, object]) -> dict[str, Tensor]:
    with use(backend):
        return evaluate(op, op.function, arguments)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name, y in expected.items():
        assert torch.equal(found[name], y), f"{where}: {name}"


def moved(x: Tensor, offset: int) -> Tensor:
    room = x.new_empty(x.numel() + offset)
    return room[offset:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "behind one element": lambda x: moved(x, 1),
    "behind three elements": lambda x: moved(x, 3),
    "with a step": lambda x: x.new_empty(*x.shape, 2)[..., 0].copy_(x),
    "with gaps": lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] + 5)[..., : x.shape[-1]].copy_(x) if x.dim() else x,
    "first dimension last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() else x,
    "all turned round": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}


# Triton's interpreter takes a thousand times as long: a few samples there, in one dtype, in the most twisted layouts.
FEW = triton_ops.INTERPRETED


def some(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return variants(op, dtype)[: 4 if FEW else None]


@pytest.mark.parametrize("layout", list(LAYOUTS)[-2 if FEW else 0 :])
@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_layouts_do_not_change_a_bit(op: Op, backend: str, layout: str) -> None:
    """In float32 and bfloat16: what a call computes depends on the values alone, not on where they lie."""
    for dtype in (torch.float32,) if FEW else (torch.float32, torch.bfloat16):
        for sample in some(op, dtype):
            arguments = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in bound(op, sample).items()}
            elsewhere = {name: LAYOUTS[layout](x) for name, x in tensors_of(arguments).items()}
            expected, found = run(op, backend, arguments), run(op, backend, {**arguments, **elsewhere})
            if op.name in PRODUCTS_OF_TORCH:
                torch.testing.assert_close(found, expected)
            else:
                equal(found, expected, f"{sample.name}, {layout}")


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_every_time_the_same_bits(op: Op, backend: str) -> None:
    for sample in some(op):
        first = run(op, backend, bound(op, sample))
        equal(run(op, backend, bound(op, sample)), first, sample.name)


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_outputs_may_be_changed_in_place(op: Op, backend: str) -> None:
    """Also where a gradient is wanted: autograd forbids it for a view."""
    arguments = bound(op, variants(op)[0])
    for name in op.differentiable:
        if isinstance(leaf := arguments.get(name), Tensor):
            leaf.requires_grad_()
    with use(backend):
        outputs = outputs_of(op.function(**arguments))
    for y in outputs.values():
        y.mul_(2)


def large_calls() -> dict[str, tuple[tuple[tuple[object, ...], dict[str, object]], ...]]:
    """Arguments of work for three threads (blip3o_threads in csrc/cpu/instruction_sets.h), positional and by name."""
    draw = Draw(lambda low, high: low, torch.float32)
    x, residual, weight, bias = draw(70, 9, 130), draw(70, 9, 130), draw(130), draw(130)
    scale, shift, gate = draw(70, 390).chunk(3, dim=-1)
    query, key, value = draw(8, 50, 8, 64).transpose(1, 2).split([4, 2, 2], dim=1)
    angles, padding = draw(50, 32), torch.arange(50) < 1 + torch.arange(8).view(8, 1, 1, 1)
    table, packed = (
        (angles.cos(), angles.sin()),
        tuple(t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value)),
    )
    biases = {"query_bias": draw(256), "key_bias": draw(128)}
    data, noise, sigma, places = draw(30, 3001), draw(30, 3001), draw(30).sigmoid(), torch.arange(30)
    heads = {"enable_gqa": True}
    return {
        "rms_norm": (((x, weight), {}),),
        "add_rms_norm": (((x, residual, weight), {}),),
        "layer_norm": (((x, weight, bias), {}),),
        "modulate": (
            ((x, scale, shift), {"weight": weight}),
            ((x, scale, shift), {"weight": weight, "bias": bias, "norm": "layer"}),
        ),
        "gated_residual": (((residual, x, gate), {"weight": weight}), ((residual, x, gate), {})),
        "rope": (((query, *table), {}), ((query, *table), {"interleaved": True})),
        "qk_norm_rope": (
            ((query, key, draw(64), draw(64), *table), {}),
            ((query, key, draw(256), draw(128), *table), {**biases, "norm": "layer", "across": "width"}),
        ),
        "attention": (
            ((query, key, value), {**heads, "is_causal": True}),
            ((query, key, value), {**heads, "attn_mask": padding}),
            ((query, key, value), {**heads, "attn_mask": draw(1, 4, 50, 50)}),
            ((query, key, value), {**heads, "window_size": (20, 1), "softcap": 3.0}),
            (packed, {**heads, "is_causal": True, "cu_seqlens_q": torch.tensor([0, 9, 9, 250, 400]).int()}),
        ),
        "swiglu": (((x, residual), {}), ((draw(70, 9, 260),), {})),
        "timestep_embedding": (((1000 * draw(900).sigmoid(), 130), {}),),
        "flow_timesteps": (((torch.arange(70_000), 1), {"distribution": "logit_normal"}),),
        "flow_interpolate": (
            ((data, noise, sigma), {}),
            ((data, None, sigma), {"seed": 1, "positions": places}),
        ),
        "flow_loss": (((data, noise, sigma), {}),),
        "flow_step": (((data, noise, sigma), {"unconditional": -noise, "guidance": 2.0, "previous": data}),),
        # logits that are sums of one number: torch's products add in an order that threads decide
        "linear_cross_entropy": (((torch.eye(100), draw(5000, 100), torch.arange(100)), {"z_loss": 1e-4}),),
    }


@pytest.mark.parametrize("op", [] if FEW else dict.fromkeys(run.values[0] for run in RUNS), ids=lambda op: op.name)
def test_threads_do_not_change_a_bit(op: Op) -> None:
    for args, kwargs in large_calls()[op.name]:
        arguments, results = bound(op, Sample("large", args, kwargs)), []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(op, "native", arguments))
        first = results[0]
        assert max(x.numel() for x in (*tensors_of(arguments).values(), *first.values())) > 3 * 16384
        for found in results[1:]:
            if op.name in PRODUCTS_OF_TORCH:
                torch.testing.assert_close(found.pop("gradient of x"), first["gradient of x"])
            equal(first, found, "with several threads")


@pytest.mark.skipif(FEW or bool(native.CPU_MISSING), reason="needs the CPU library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_past_the_caches(dtype: torch.dtype) -> None:
    """From 16 MiB on they are stored in another way (past_caches in csrc/cpu/vector.h), with the same bits."""
    x, noise = torch.randn(2, 2**12 * (1 + (dtype is torch.bfloat16)), 1024).to(dtype)
    sigma, weight, bias = torch.rand(len(x)), torch.randn(1024).to(dtype), torch.randn(1024).to(dtype)
    assert x.nbytes == 2**24

    def results(part: slice) -> tuple[Tensor, ...]:
        ours, theirs = x[part].detach().requires_grad_(), noise[part].detach().requires_grad_()
        gradients = torch.autograd.grad(flow_loss(ours, theirs, sigma[part]) * len(ours), (ours, theirs))
        return (layer_norm(x[part], weight, bias), *flow_interpolate(x[part], noise[part], sigma[part]), *gradients)

    with use("native"):
        whole = results(slice(None))
        for part in (slice(0, 8), slice(1016, 1032), slice(len(x) - 8, len(x))):  # powers of two: a loss scales exactly
            for y, expected in zip(whole, results(part), strict=True):
                assert torch.equal(y[part], expected)


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_rows_past_two_to_the_31(op: Op, backend: str) -> None:
    """A dimension of every tensor has a step of 2^30 elements, in memory that is never touched between."""
    tried = 0
    for sample in op.samples(torch.bfloat16):
        if tried == (1 if FEW else 3):
            break
        arguments, apart = bound(op, sample), {}
        for name, x in tensors_of(arguments).items():
            far = next((i for i in range(max(x.dim() - 1, 1)) if 2 < x.shape[i] < 6), None) if x.dim() else None
            if far is not None:
                strides = list(x.movedim(far, 0).contiguous().movedim(0, far).stride())
                strides[far] = 2**30
                try:
                    apart[name] = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
                except RuntimeError:  # more than this machine gives out at once
                    continue
        if apart:
            near = {name: x.contiguous() for name, x in apart.items()}
            equal(run(op, backend, {**arguments, **apart}), run(op, backend, {**arguments, **near}), sample.name)
            tried += 1
    assert tried


def loses(op: Op, output: str, found: Tensor, expected: Tensor) -> bool:
    """Whether `found` is not finite where the reference's is, or is not so in the same way.

    Of gradients only the places count, and the reference may have more, where it multiplies an infinity by a 0. In
    attention it also does so in the forward pass, at the keys that a query does not see; and there gradients are summed
    over blocks of queries.
    """
    ours, theirs = ~found.isfinite(), ~expected.isfinite()
    if op.name == "attention":
        return bool(ours.any() and not theirs.any()) if "gradient" in output else bool((ours & ~theirs).any())
    if "gradient" in output:
        return bool((ours & ~theirs).any() or ours.any() != theirs.any())
    return not all(torch.equal(test(found), test(expected)) for test in (torch.isnan, torch.isposinf, torch.isneginf))


def zero_by_contract(arguments: dict[str, object]) -> bool:
    """Whether a row of targets is ignored or a query sees nothing: gradients are 0 then, not 0 times infinity."""
    target, mask = arguments.get("target"), arguments.get("attn_mask")
    ignored = isinstance(target, Tensor) and (target == arguments.get("ignore_index", -100)).any()
    return bool(ignored or (isinstance(mask, Tensor) and mask.dtype is torch.bool and not mask.any(-1).all()))


@pytest.mark.parametrize("value", [torch.nan] if FEW else [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_infinities_and_nan(op: Op, backend: str, value: float) -> None:
    """One such element in each input: NaN and infinities come out where the reference has them."""
    for sample in some(op):
        arguments = bound(op, sample)
        hides = {"attn_mask", "is_causal", "window_size", "cu_seqlens_q"} & set(arguments)
        if op.name == "attention" and math.isinf(value) and hides:
            continue  # the reference hides keys behind a finite number; where all else is -infinity it would see them
        for name, x in floating(arguments).items():
            spoilt = torch.empty(x.shape).copy_(x)
            spoilt.view(-1)[spoilt.numel() // 2] = value
            given = {**arguments, name: spoilt}
            expected, found = evaluate(op, op.reference, given), run(op, backend, given)
            if zero_by_contract(arguments):
                expected = {"output 0": expected["output 0"]}
            wrong = [output for output, y in expected.items() if loses(op, output, found[output], y)]
            assert not wrong, f"{sample.name}, {value} in {name}: {wrong}"


@pytest.mark.parametrize(("op", "backend"), RUNS)
def test_random_calls(op: Op, backend: str) -> None:
    """Shapes, strides, offsets and options as Hypothesis finds them, within the conformance bound."""

    @settings(
        max_examples=4 if FEW else 60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def check(data: st.DataObject, dtype: torch.dtype) -> None:
        draw = Draw(lambda low, high: data.draw(st.integers(low, high)), dtype)
        args, kwargs = CALLS[op.name](draw)
        arguments = bound(op, Sample("random", args, kwargs))
        expected = expectation(op, backend, arguments)
        broken = list(violations(run(op, backend, arguments), expected, any_size=True))
        assert not broken, (broken, {name: getattr(x, "shape", x) for name, x in arguments.items()})

    check()


def test_every_op_has_random_calls() -> None:
    assert {op.name for op in OPS} <= set(CALLS)
