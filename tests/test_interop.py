"""Every op as torch's other parts see it: registration, compilation, tracing, fake, meta, functional and distributed
tensors, functorch, FLOP counting, activation checkpointing, double differentiation. Right, or a typed error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conformance import bound, evaluate, floating, outputs_of, tensors_of, variants
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blip3o_kernels import OPS, attention, triton_ops, use
from blip3o_kernels.dispatch import Op
from blip3o_kernels.samples import Sample

# The bodies that this process is about: Triton's if it is interpreted (slowly: two samples of each op), else native's.
BACKEND = "triton" if triton_ops.INTERPRETED else "native"
BACKENDS = [BACKEND] if triton_ops.INTERPRETED else ["", BACKEND]  # what is not forced is the same in the interpreter
BODIES = [op for op in OPS if any((body.backend, body.device) == (BACKEND, "cpu") for body in op.bodies)]


def some(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return variants(op, dtype)[: 2 if triton_ops.INTERPRETED else None]


CASES = [pytest.param(op, sample, id=f"{op.name}-{sample.name}") for op in BODIES for sample in some(op)]
BFLOAT16_CASES = [
    pytest.param(op, replace(sample, name=f"bfloat16 {sample.name}"), id=f"{op.name}-bfloat16 {sample.name}")
    for op in BODIES
    for sample in some(op, torch.bfloat16)
]
DIFFERENTIABLE = [case for case in CASES if case.values[0].differentiable]
# One op in a compiled graph though nobody asks: the formula would hold all logits, draw bits in int64, or be slower.
OPAQUE = ("attention", "linear_cross_entropy", "flow_timesteps")
# What torch raises where a transform meets an op that it has no rule for.
TYPED = (NotImplementedError, RuntimeError)


def forcing(backend: str) -> AbstractContextManager[None]:
    return use(backend) if backend else nullcontext()


def call(op: Op, sample: Sample, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return outputs_of(op.function(**{**bound(op, sample), **tensors}))


def of_tensors(op: Op, sample: Sample) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The op as a function of its floating tensors, or if it has none of all its tensors, and these."""
    arguments = floating(bound(op, sample)) or tensors_of(bound(op, sample))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(op, sample, dict(zip(arguments, tensors, strict=True))).values())

    return function, list(arguments.values())


def leaves_of(op: Op, sample: Sample, wanted: tuple[str, ...]) -> list[Tensor]:
    """The tensors of `of_tensors`, with a gradient where it is wanted."""
    return [x.detach().requires_grad_(name in wanted) for name, x in floating(bound(op, sample)).items()]


def same(found: dict[str, Tensor] | tuple[Tensor, ...], expected: dict[str, Tensor] | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


class Recorder(TorchDispatchMode):
    """Collects the calls of registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "blip3o":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("op", "sample"), [*CASES, *BFLOAT16_CASES])
def test_opcheck(op: Op, sample: Sample) -> None:
    """Schema, fake implementation, autograd registration and tracing of the registered ops, as torch tests them.

    In bfloat16 the fake results alone: their dtypes are what another dtype changes.
    """
    with Recorder() as recorder, use(BACKEND):
        evaluate(op, op.function, bound(op, sample))
    names = {func.name().removeprefix("blip3o::") for func, _ in recorder.calls}
    assert names == {op.name, *([f"{op.name}_backward"] if op.differentiable else [])}
    checks = OPCHECKS[2] if "bfloat16" in sample.name else OPCHECKS
    for func, arguments in recorder.calls:
        leaf = func.name() == f"blip3o::{op.name}"
        given = [
            x.detach().clone().requires_grad_(leaf and x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        assert not (leaf and op.differentiable) or any(isinstance(x, Tensor) and x.requires_grad for x in given)
        torch.library.opcheck(func, tuple(given), test_utils=checks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_compile(op: Op, sample: Sample, backend: str) -> None:
    """No graph break, forward and backward, in shapes that change: as the formula, and as one opaque op if forced."""
    torch._dynamo.reset()
    graphs = []

    def captured(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend=captured)
    with forcing(backend):
        same(evaluate(op, compiled, bound(op, sample)), evaluate(op, op.function, bound(op, sample)))
    opaque = backend == BACKEND or op.name in OPAQUE or sample.name.startswith("drawn")
    assert (f"blip3o.{op.name}" in graphs[0]) == opaque


@pytest.mark.parametrize("op", BODIES, ids=lambda op: op.name)
def test_compiled_once_for_all_shapes(op: Op) -> None:
    """One graph serves every size: the opaque op does not tie a size down."""
    torch._dynamo.reset()
    families: dict[str, list[Sample]] = {}
    for sample in op.samples(torch.float32):
        arguments, seen = bound(op, sample), [0, 1]  # torch compiles for sizes of 0 and 1, and for equal sizes
        pattern = {
            name: (x.dtype, x.is_contiguous(), x.stride()[-1:], [seen.append(n) or seen.index(n) for n in x.shape])  # type: ignore[func-returns-value]
            if isinstance(x, Tensor)
            else x
            for name, x in arguments.items()
        }
        widths = sample.args[0].shape[-1:] if op.name == "attention" else ()  # its scale is a constant of the graph
        families.setdefault(f"{pattern} {widths}", []).append(sample)
    family = max(families.values(), key=len)
    assert len(family) > 1, "needs two samples of this op that differ in sizes alone, and not in the width of a head"
    counter = CompileCounter()
    compiled = torch.compile(op.function, fullgraph=True, dynamic=True, backend=counter)
    with use(BACKEND), torch.no_grad():
        for sample in family:
            compiled(*sample.args, **sample.kwargs)
    assert counter.frame_count == 1, [sample.name for sample in family]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_meta_and_fake(op: Op, sample: Sample, backend: str) -> None:
    """Shapes, dtypes and strides without values."""
    with forcing(backend):
        expected = call(op, sample, {})
    tensors = tensors_of(bound(op, sample))
    with torch._subclasses.FakeTensorMode() as mode, forcing(backend):
        faked = call(op, sample, {name: mode.from_tensor(x) for name, x in tensors.items()})
    found = [faked]
    if not backend:  # no body runs on the device "meta"
        found.append(call(op, sample, {name: x.to("meta") for name, x in tensors.items()}))
    for outputs in found:
        for name, y in expected.items():
            assert (outputs[name].shape, outputs[name].dtype) == (y.shape, y.dtype)
            assert not backend or outputs[name].stride() == y.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_tracing(op: Op, sample: Sample, backend: str) -> None:
    tensors = tensors_of(bound(op, sample))
    names, tensors = list(tensors), list(tensors.values())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(op, sample, dict(zip(names, values, strict=True))).values())

    with forcing(backend):
        expected = function(*tensors)
        same(torch.func.functionalize(function)(*tensors), expected)
        for mode in ("real", "fake", "symbolic"):
            traced = make_fx(function, tracing_mode=mode)(*tensors)
            same(traced(*tensors), expected)
            assert f"blip3o.{op.name}" in traced.code or not backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_functorch(op: Op, sample: Sample, backend: str) -> None:
    """vmap over all inputs, and over each alone; grad and forward mode, which if forced may be an error instead."""
    function, tensors = of_tensors(op, sample)
    stacked = [torch.stack((x, x.flip(0), x / 2 if x.is_floating_point() else x)) for x in tensors]
    dims = [tuple(0 if i == j else None for j in range(len(tensors))) for i in range(len(tensors))]
    for in_dims in ((0,) * len(tensors), *dims):
        rows = [
            [each[i] if dim == 0 else x for each, x, dim in zip(stacked, tensors, in_dims, strict=True)]
            for i in range(3)
        ]
        given = [each if dim == 0 else x for each, x, dim in zip(stacked, tensors, in_dims, strict=True)]
        with forcing(backend):
            expected = tuple(torch.stack(parts) for parts in zip(*(function(*row) for row in rows), strict=True))
            same(torch.vmap(function, in_dims=in_dims)(*given), expected)
    if not op.differentiable:
        return
    primal = next(i for i, name in enumerate(floating(bound(op, sample))) if name in op.differentiable)

    def summed(x: Tensor) -> Tensor:
        given = [*tensors[:primal], x, *tensors[primal + 1 :]]
        return sum((y.sin().sum() for y in function(*given)), torch.zeros(()))

    leaf = tensors[primal].detach().clone().requires_grad_()
    with use("reference"):
        (expected,) = torch.autograd.grad(summed(leaf), leaf)
    direction = torch.ones_like(leaf)
    with forcing(backend):
        try:
            same((torch.func.grad(summed)(tensors[primal]),), (expected,))
            _, slope = torch.func.jvp(summed, (tensors[primal],), (direction,))
        except TYPED as error:
            assert backend, error
        else:
            torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-4, atol=1e-3, check_dtype=False)


def test_vmap_over_where_sequences_begin() -> None:
    """The formula can, a body says that it cannot."""
    x = torch.randn(1, 2, 6, 8)
    starts = torch.tensor([[0, 2, 6], [0, 3, 6]], dtype=torch.int32)
    packed = torch.vmap(lambda cu_seqlens: attention(x, x, x, cu_seqlens_q=cu_seqlens))
    same((packed(starts),), (torch.stack([attention(x, x, x, cu_seqlens_q=each) for each in starts]),))
    with use(BACKEND), pytest.raises(NotImplementedError, match="attention: vmap over cu_seqlens_q"):
        packed(starts)


@pytest.mark.parametrize("op", BODIES, ids=lambda op: op.name)
def test_flops_are_counted(op: Op) -> None:
    sample = variants(op)[0]
    with FlopCounterMode(display=False) as counter, use(BACKEND):
        evaluate(op, op.function, bound(op, sample))
    counted = counter.get_flop_counts()["Global"]
    if op.name == "rms_norm":
        assert counted[torch.ops.blip3o.rms_norm] == 4 * sample.args[0].numel()  # type: ignore[attr-defined]
    assert {str(name): number > 0 for name, number in counted.items() if "blip3o" in str(name)} == {
        f"blip3o.{name}": True for name in (op.name, *([f"{op.name}_backward"] if op.differentiable else []))
    }


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_activation_checkpointing(op: Op, sample: Sample) -> None:
    def again(**arguments: object) -> object:
        names = list(arguments)
        return checkpoint(
            lambda *values: op.function(**dict(zip(names, values, strict=True))),
            *arguments.values(),
            use_reentrant=False,
        )

    with use(BACKEND):
        found, expected = evaluate(op, again, bound(op, sample)), evaluate(op, op.function, bound(op, sample))
    for name, y in expected.items():
        assert torch.equal(found[name], y), name


def squared_gradients(
    function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    total = sum((loss(y) for y in function(*leaves)), torch.zeros(()))
    gradients = torch.autograd.grad(total, [x for x in leaves if x.requires_grad], create_graph=True)
    return sum((x.square().sum() for x in gradients), torch.zeros(()))


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE)
def test_double_differentiation_raises(op: Op, sample: Sample, registered: bool) -> None:
    """A body has no second derivative: asking for one raises, also where nothing but the saved inputs depends on it."""
    function, _ = of_tensors(op, sample)
    for loss in (torch.sum, lambda y: y.sin().sum()):  # what comes in from above: a constant, a function of the inputs
        with use("reference"):
            linear = not squared_gradients(function, leaves_of(op, sample, op.differentiable), loss).requires_grad
        with use(BACKEND), Recorder() if registered else nullcontext():
            squares = squared_gradients(function, leaves_of(op, sample, op.differentiable), loss)
            if not (linear and not squares.requires_grad):  # then there is nothing to differentiate
                with pytest.raises(RuntimeError, match="differentia"):
                    squares.backward()


@pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE)
def test_only_the_gradients_asked_for(op: Op, sample: Sample) -> None:
    """Each input's gradient alone is the one beside the others', and each of several outputs may go unused."""
    function, tensors = of_tensors(op, sample)
    outputs = len(function(*tensors))

    def gradients(wanted: tuple[str, ...], used: int) -> tuple[Tensor | None, ...]:
        leaves = leaves_of(op, sample, wanted)
        y = function(*leaves)[used]
        return torch.autograd.grad(y.sin().sum(), [x for x in leaves if x.requires_grad], allow_unused=True)

    names = tuple(name for name in floating(bound(op, sample)) if name in op.differentiable)
    for used in range(outputs):
        with use("reference"):
            expected = gradients(names, used)
        with use(BACKEND):
            together = gradients(names, used)
            for name, x, y in zip(names, together, expected, strict=True):
                if y is None:  # nothing depends on it: no gradient, or zeros
                    assert x is None or not x.any()
                    continue
                same((x,), (y,))
                assert torch.equal(gradients((name,), used)[0], x), name


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_lazy_negation_and_conjugation_of_any_input(op: Op, sample: Sample) -> None:
    expected = call(op, sample, {})
    for name, x in floating(bound(op, sample)).items():
        negated = torch._neg_view(-x)
        assert negated.is_neg()
        with use(BACKEND):
            same(call(op, sample, {name: negated}), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_jit_trace(op: Op, sample: Sample, backend: str) -> None:
    """What is traced computes: the formula, or the one op where a backend is forced."""
    function, tensors = of_tensors(op, sample)
    with forcing(backend):
        traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
    expected = function(*tensors)
    for _ in range(2):
        same(tuple(traced(*tensors)), expected)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_zeros_without_memory_as_any_input(op: Op, sample: Sample) -> None:
    """Tangents and gradients that are zero may come as such; their address is null."""
    for name, x in floating(bound(op, sample)).items():
        expected = call(op, sample, {name: torch.zeros_like(x)})
        with use(BACKEND), torch.no_grad():
            same(call(op, sample, {name: torch._efficientzerotensor(x.shape, dtype=x.dtype)}), expected)


@pytest.fixture(scope="module")
def mesh() -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", BODIES, ids=lambda op: op.name)
def test_distributed_tensors(op: Op, backend: str, mesh: dist.DeviceMesh) -> None:
    sample = variants(op)[0]
    tensors = {name: distribute_tensor(x, mesh, [Replicate()]) for name, x in tensors_of(bound(op, sample)).items()}
    with forcing(backend):
        try:
            found = call(op, sample, tensors)
        except TYPED as error:
            assert str(error)
            return
    whole = {name: y.full_tensor() if isinstance(y, DTensor) else y for name, y in found.items()}
    same(whole, call(op, sample, {}))


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_inference_mode(op: Op, sample: Sample) -> None:
    expected = call(op, sample, {})
    with torch.inference_mode():
        same(call(op, sample, {}), expected)
