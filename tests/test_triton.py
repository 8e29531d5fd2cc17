"""The Triton bodies without a GPU: their numbers in the interpreter, their code compiled ahead of time for six GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason='needs triton: pip install "blip3o[triton]"')
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from blip3o_kernels import OPS  # noqa: E402

ROOT = Path(__file__).parents[1]
TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("cuda", 120, 32),
    GPUTarget("hip", "gfx942", 64),
    GPUTarget("hip", "gfx1100", 32),
)


def test_conformance_in_the_interpreter() -> None:
    """tests/test_ops.py once more, with Triton's interpreter on: then the bodies run on a CPU and take part."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_ops.py", "-k", "conformance and triton-cpu"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    bodies = [body for op in OPS for body in op.bodies if (body.backend, body.device) == ("triton", "cpu")]
    assert re.search(rf"\b{sum(len(body.dtypes) for body in bodies)} passed, \d+ deselected", run.stdout), run.stdout


# Integers are declared multiples of 16, as Triton itself does when they are: 16-byte loads depend on it.
def compiled(
    target: GPUTarget, kernel: object, types: dict[str, str], constants: dict[str, object], warps: int
) -> object:
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names  # type: ignore[attr-defined]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] in "*i"},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.backend}-{target.arch}")
def test_compiles_without_spills(target: GPUTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from blip3o_kernels.triton_ops import rms_norm

    block, whole, warps = rms_norm.tile(4096)
    shape = {"width": "i32", "stride": "i32", "eps": "fp32", "offset": "fp32"}
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16"}
    constants: dict[str, object] = {"WEIGHTED": True, "BLOCK": block, "IS_WHOLE": whole}
    forward = compiled(
        target,
        rms_norm._forward_kernel,
        {"y_ptr": "*bf16", **pointers, **shape},
        {**constants, "ROUND_BEFORE_WEIGHT": True},
        warps,
    )
    backward = compiled(
        target,
        rms_norm._backward_kernel,
        {
            "dx_ptr": "*bf16",
            "partial_ptr": "*fp32",
            "dy_ptr": "*bf16",
            **pointers,
            "rows": "i32",
            "blocks": "i32",
            **shape,
        },
        {**constants, "WANTED": True},
        warps,
    )
    total = compiled(
        target,
        rms_norm._sum_kernel,
        {"dweight_ptr": "*bf16", "partial_ptr": "*fp32", "blocks": "i32", "width": "i32"},
        {"BLOCK": 128},
        4,
    )
    for kernel in (forward, backward, total):
        code = kernel.asm  # type: ignore[attr-defined]
        if target.backend == "hip":
            assert ".vgpr_spill_count: 0\n" in code["amdgcn"] and ".sgpr_spill_count: 0\n" in code["amdgcn"]
            continue
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        if target.arch >= 100 and ptxas.with_name("ptxas-blackwell").exists():
            ptxas = ptxas.with_name("ptxas-blackwell")
        (tmp_path / "kernel.ptx").write_text(code["ptx"])
        name = re.search(r"\.target (sm_\w+)", code["ptx"])
        assert name is not None
        command = [str(ptxas), "-v", f"--gpu-name={name[1]}", str(tmp_path / "kernel.ptx"), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report
        if kernel is not total:
            assert "ld.global.v4.b32" in code["ptx"], "16-byte loads are missing"
