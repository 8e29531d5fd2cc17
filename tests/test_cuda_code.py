"""The machine code of the CUDA kernels keeps its limits, and the check of that can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cuda_code
import pytest
from code_limits import Code

pytestmark = pytest.mark.gpu_code


@pytest.fixture(scope="module")
def library() -> Path:
    """libblip3o_cuda.so for every architecture: the target cuda_all, which builds again only what has changed."""
    if cuda_code.missing():
        pytest.skip(f"the CUDA sources are not checked: needs {cuda_code.missing()}")
    return cuda_code.build()


@pytest.fixture(scope="module")
def codes(library: Path) -> cuda_code.Codes:
    return cuda_code.measure(library)


def test_machine_code_keeps_its_limits(codes: cuda_code.Codes) -> None:
    wrong = cuda_code.check(codes, cuda_code.read(), cuda_code.version())
    assert not wrong, "\n".join(wrong)


def test_limits_can_fail() -> None:
    """More than a limit, a lost instruction, a spill, a new kernel and a lost one are told, with the command; less of
    anything is fine, and under another nvcc only spills count."""
    code = Code(registers=30, shared=128, load16=2, store16=1)
    found: cuda_code.Codes = {"swiglu: forward_kernel<8, bf16>": dict.fromkeys(cuda_code.GPUS, code)}
    limits = {"nvcc": "13.0", "code": cuda_code.updated(found, {"code": {}})}

    def wrong(nvcc: str = "13.0", **other: object) -> list[str]:
        changed = {kernel: {**gpus, "sm_90a": replace(code, **other)} for kernel, gpus in found.items()}  # type: ignore[arg-type]
        return cuda_code.check(changed, limits, nvcc)

    assert not wrong() and not wrong(registers=32) and not wrong(registers=8, shared=0, load16=1, matrix=1)
    assert wrong(registers=33) == ["swiglu: forward_kernel<8, bf16> for sm_90a: registers 33, limit 32"]
    assert "shared 132, limit 128" in wrong(shared=132)[0] and "stack 8, limit 0" in wrong(stack=8)[0]
    assert "holds no load16 any more" in wrong(load16=0)[0]
    assert "spills 16 bytes" in wrong(spills=16)[0] and "spills" in wrong("12.8", spills=16, registers=255)[0]
    assert len(cuda_code.check(found, {"nvcc": "13.0", "code": {}}, "13.0")) == len(cuda_code.GPUS)
    assert cuda_code.COMMAND in cuda_code.check(found, {"nvcc": "13.0", "code": {}}, "13.0")[0]
    assert "is no more" in cuda_code.check({}, limits, "13.0")[0]
    limits["code"]["swiglu: forward_kernel<8, bf16>"] |= {"spills": 16, "reason": "this test"}  # type: ignore[index]
    assert not wrong(spills=16) and wrong(spills=20)


def test_names_can_be_read() -> None:
    for name, expected in (
        ("void (anonymous namespace)::k<8, false, __nv_bfloat16>(blip3o_rope_arguments)", "rope: k<8, false, bf16>"),
        ("void blip3o::k<4, float, blip3o_rms_norm_arguments>(blip3o_rms_norm_arguments)", "rms_norm: k<4, fp32>"),
        ("void blip3o::sum<__half>(__half*, float const*, long)", "sum<fp16>"),
        ("void blip3o::k<(blip3o::Kind)1>(float (*)(int), blip3o_swiglu_arguments)", "swiglu: k<(Kind)1>"),
        ("blip3o::plain(blip3o_swiglu_backward_arguments)", "swiglu_backward: plain"),
    ):
        assert cuda_code.readable(name) == expected
