"""One conformance test for every op, backend, dtype and sample; what each op has beside its reference; forcing a
backend.

tests/conformance.py states the bound.

The Triton bodies take part when TRITON_INTERPRET=1; tests/test_triton.py starts this file that way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conformance import bound, evaluate, expectation, violations
from torch import Tensor

from blip3o_kernels import (
    OPS,
    BackendError,
    explain,
    linear_cross_entropy,
    native,
    ops,
    rms_norm,
    use,
)
from blip3o_kernels.dispatch import INSTRUCTION_SETS, Op, choose

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# What every op has beside its reference: (backend, device) -> (dtypes, directions). An op that is not named has
# nothing. On a CPU, Triton runs in its interpreter only.
BOTH = (FLOATS, "forward and backward")
NATIVE = {("native", "cpu"): BOTH}
CUDA = {("native", "cuda"): BOTH}
TRITON = {("triton", "cuda"): BOTH, ("triton", "cpu"): BOTH}
MATRIX = {
    "rms_norm": {**NATIVE, **CUDA, **TRITON},
    # of positions, which are int64; no gradient
    "flow_timesteps": dict.fromkeys({**NATIVE, **CUDA, **TRITON}, ((torch.int64,), "forward")),
    "add_rms_norm": {**NATIVE, **CUDA, **TRITON},
    "layer_norm": {**NATIVE, **CUDA, **TRITON},
    "modulate": {**NATIVE, **CUDA, **TRITON},
    "gated_residual": {**NATIVE, **CUDA, **TRITON},
    "rope": {**NATIVE, **CUDA, **TRITON},
    "qk_norm_rope": {**NATIVE, **CUDA, **TRITON},
    "attention": {**NATIVE, **CUDA, **TRITON},
    "swiglu": {**NATIVE, **CUDA, **TRITON},
    "timestep_embedding": {**NATIVE, **CUDA, **TRITON},
    "flow_interpolate": {**NATIVE, **CUDA, **TRITON},
    "flow_loss": {**NATIVE, **CUDA, **TRITON},
    "flow_step": {**NATIVE, **CUDA, **TRITON},
    "linear_cross_entropy": {**NATIVE, **CUDA, **TRITON},
}


def test_matrix() -> None:
    declared = {
        op.name: {
            (body.backend, body.device): (body.dtypes, "forward and backward" if body.backward else "forward")
            for body in op.bodies
        }
        for op in OPS
        if op.bodies
    }
    assert declared == MATRIX


def test_native_bodies_are_built() -> None:
    """What the matrix declares for a CPU runs here: a missing library fails this test, not shortens the next."""
    for op in OPS:
        for body in op.bodies:
            if (body.backend, body.device) == ("native", "cpu"):
                assert not body.missing


def runs_here(instruction_set: str) -> bool:
    """And is not what "native" takes anyway."""
    return INSTRUCTION_SETS[instruction_set] < INSTRUCTION_SETS[native.instruction_set() or "portable"]


def runs() -> Iterator[object]:
    for op in OPS:
        for device in DEVICES:
            for dtype in FLOATS:
                yield pytest.param(op, "reference", device, dtype, id=f"{op.name}-reference-{device}-{dtype}")
        for body in op.bodies:
            if body.device not in DEVICES or (body.backend == "triton" and body.device == "cpu" and body.missing):
                continue
            for dtype in body.dtypes:
                backends = [body.backend]
                if (body.backend, body.device) == ("native", "cpu"):
                    backends += [
                        f"native:{name}" for name in ("portable", "avx2", "avx512", "avx512_bf16") if runs_here(name)
                    ]
                for backend in backends:
                    yield pytest.param(op, backend, body.device, dtype, id=f"{op.name}-{backend}-{body.device}-{dtype}")


@pytest.mark.parametrize(("op", "backend", "device", "dtype"), list(runs()))
def test_conformance(op: Op, backend: str, device: str, dtype: torch.dtype) -> None:
    for sample in op.samples(dtype, device):
        arguments = bound(op, sample)
        expected = expectation(op, backend, arguments)
        with use(backend):
            got = evaluate(op, op.function, arguments)
        broken = list(violations(got, expected))
        assert not broken, f"{op.name} {sample.name}: {broken}"


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
def test_reference_gradients(op: Op) -> None:
    """The references are differentiated correctly: their gradients against finite differences, in float64."""
    checked = 0
    for sample in op.samples(torch.float64):
        arguments = bound(op, sample)
        names = [name for name in op.differentiable if isinstance(arguments.get(name), Tensor)]
        tensors = [arguments[name].detach().double().requires_grad_() for name in names]  # type: ignore[attr-defined]
        if sum(tensor.numel() for tensor in tensors) > 400 or not all(tensor.numel() for tensor in tensors):
            continue
        if sample.name == "large values" or "extreme" in sample.name:  # finite differences need a scale of about 1
            continue

        def call(*values: Tensor, names: list[str] = names, arguments: dict[str, object] = arguments) -> object:
            return op.reference(**{**arguments, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(call, tensors), sample.name
        checked += 1
    assert checked


def test_forced_backend_refuses() -> None:
    x = torch.randn(2, 8)
    with use("native"), pytest.raises(BackendError, match=r"rms_norm.*no native body"):
        choose(replace(ops.rms_norm.OP, bodies=()), x)
    with use("native"), pytest.raises(BackendError, match=r"does not take torch.float64"):
        rms_norm(x.double())
    with use("native"), pytest.raises(BackendError, match="does not run on meta tensors"):
        rms_norm(x.to("meta"))
    for word in ("cuda", "native:neon", "triton:avx2", "native:"):
        with pytest.raises(ValueError, match="use: "), use(word):
            pass
    with use("triton"):
        with use("reference"):
            rms_norm(x)
        if not _interpreted():
            with pytest.raises(BackendError, match="interpreter"):
                rms_norm(x)


def _interpreted() -> bool:
    return not next(body for body in ops.rms_norm.OP.bodies if (body.backend, body.device) == ("triton", "cpu")).missing


def test_explain() -> None:
    x = torch.randn(2, 8)
    assert explain(rms_norm, x).startswith("rms_norm on cpu torch.float32: native")
    with use("reference"):
        assert explain("rms_norm", x).startswith("rms_norm on cpu torch.float32: reference (asked for")
    assert "does not take torch.float64" in explain("rms_norm", x.double())
    assert explain("timestep_embedding", torch.arange(3)).startswith("timestep_embedding on cpu torch.float32: native")
    assert explain("flow_timesteps", torch.arange(3)).startswith("flow_timesteps on cpu torch.int64: native")
    with pytest.raises(ValueError, match="op: expected one of rms_norm"):
        explain("rmsnorm", x)


def test_errors_name_the_argument() -> None:
    x, wrong = torch.randn(2, 3, 8), torch.randn(7)
    with pytest.raises(ValueError, match=r"weight: expected shape \[8\], got \[7\]"):
        rms_norm(x, wrong)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        rms_norm(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dropout_p: expected 0.0"):
        ops.attention.attention(*torch.randn(3, 1, 1, 2, 4).unbind(0), dropout_p=0.1)
    with pytest.raises(ValueError, match="key: expected enable_gqa=True"):
        ops.attention.attention(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    x4, ends = torch.randn(1, 2, 3, 4), torch.tensor([0, 1, 3], dtype=torch.int32)
    for match, wrong_arguments in (
        ("window_size: expected", {"window_size": (-2, 0)}),
        ("softcap: expected", {"softcap": -1.0}),
        (
            r"cu_seqlens_q: expected ascending from 0 to 3, got \[0, 2, 1, 3\]",
            {"cu_seqlens_q": torch.tensor([0, 2, 1, 3], dtype=torch.int32)},
        ),
        (
            r"cu_seqlens_k: expected ascending from 0 to 3, got \[0, 1, 2\]",
            {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clamp(max=2)},
        ),
        (r"cu_seqlens_k: expected shape \[N \+ 1\]", {"cu_seqlens_q": ends, "cu_seqlens_k": ends[[0, 2]]}),
        ("cu_seqlens_q: expected a tensor", {"cu_seqlens_k": ends}),
        ("attn_mask: expected None", {"cu_seqlens_q": ends, "attn_mask": torch.ones(3, 3) > 0}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.attention.attention(x4, x4, x4, **wrong_arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cu_seqlens_q: expected an int32"):
        ops.attention.attention(x4, x4, x4, cu_seqlens_q=ends.long())
    with pytest.raises(ValueError, match="query: expected a batch of 1"):
        ops.attention.attention(*[x4.expand(2, 2, 3, 4)] * 3, cu_seqlens_q=ends)
    with pytest.raises(ValueError, match="scale: expected shape"):
        ops.modulate.modulate(x, torch.randn(2, 7))
    with pytest.raises(TypeError, match="target: expected an int64"):
        linear_cross_entropy(x, torch.randn(5, 8), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"residual: expected the shape of x, \[2, 3, 8\], got \[3, 8\]"):
        ops.add_rms_norm.add_rms_norm(x, x[0])
    with pytest.raises(ValueError, match=r"weight: expected shape \[8\], got \[7\]"):
        ops.add_rms_norm.add_rms_norm(x, x, torch.randn(7))
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    table = ops.rope.rope_table(torch.arange(3), 8, 100.0)
    with pytest.raises(ValueError, match=r"key: expected shape \[2, G, 3, 8\], got \[2, 2, 2, 8\]"):
        ops.qk_norm_rope.qk_norm_rope(query, key[:, :, :2], torch.randn(8), torch.randn(8), *table)
    with pytest.raises(ValueError, match=r"key_weight: expected shape \[16\], got \[8\]"):
        ops.qk_norm_rope.qk_norm_rope(query, key, torch.randn(32), torch.randn(8), *table, across="width")
    with pytest.raises(ValueError, match="norm: expected 'rms' or 'layer', got 'group'"):
        ops.qk_norm_rope.qk_norm_rope(query, key, torch.randn(8), torch.randn(8), *table, norm="group")
    with pytest.raises(ValueError, match=r"cos: expected shape \[3, R/2\] or \[2, 3, R/2\]"):
        ops.qk_norm_rope.qk_norm_rope(query, key, torch.randn(8), torch.randn(8), table[0][:2], table[1][:2])
