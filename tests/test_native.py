"""The native libraries and the way in: interface, instruction sets, status, what is missing, how they are built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip3o_kernels import OPS, BackendError, attention, native, rms_norm, use
from blip3o_kernels.dispatch import INSTRUCTION_SETS
from blip3o_kernels.ops import rms_norm as contract

ROOT = Path(__file__).parents[1]
SETS = [name for name in INSTRUCTION_SETS if name]
SETS_HERE = SETS[: SETS.index(native.instruction_set() or "portable") + 1]
LETTERS = {"double": "d", "float": "f", "int": "i", "int64_t": "q"}


def formats(header: str) -> dict[str, str]:
    """The structs of blip3o.h as `struct` formats."""
    found = {}
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    for body, name in re.findall(r"typedef struct \{(.*?)\} blip3o_(\w+)_arguments;", header, flags=re.DOTALL):
        found[name] = ""
        for declaration in body.split(";")[:-1]:
            kind = declaration.split(",")[0].split()
            letter = "P" if "*" in "".join(kind) else LETTERS[kind[-2]]
            found[name] += letter * len(declaration.split(","))
    return found


def test_interface_is_the_header() -> None:
    header = (ROOT / "csrc/blip3o.h").read_text()
    assert formats(header) == native.FORMATS
    bodies = {(op.name, body.device) for op in OPS for body in op.bodies if body.backend == "native"}
    for name in native.FORMATS:
        for kind in ("cpu", "cuda"):
            declaration = f"int blip3o_{kind}_{name}(const blip3o_{name}_arguments* arguments);"
            only_cpu = name.endswith("_fused") and kind == "cuda"
            declared = not only_cpu and (re.sub("_(backward|fused)$", "", name), kind) in bodies
            assert (declaration in header) == declared, declaration
    for constant, value in (("VERSION", native.VERSION), ("CHUNK", native.CHUNK)):
        assert f"#define BLIP3O_{constant} {value}\n" in header
    for dtype, code in native.DTYPES.items():
        assert f"BLIP3O_{str(dtype).removeprefix('torch.').upper()} = {code}" in header


def test_one_openmp_runtime() -> None:
    """The library brings none: its symbols come from torch's, wherever that lies."""
    program = (
        "import torch; from blip3o_kernels import native, rms_norm; torch.set_num_threads(2);"
        "rms_norm(torch.randn(4096, 256)); torch.randn(512, 512) @ torch.randn(512, 512);"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if len(line.split()) > 5};"
        "print(*[n for n in names if 'omp' in n.rsplit('/', 1)[-1] and '.so' in n], sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    assert len(found.stdout.split()) == 1, found.stdout


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", **extra}


def test_instruction_sets() -> None:
    x = torch.randn(4, 100)
    best = native.instruction_set()
    assert best in INSTRUCTION_SETS
    with use(f"native:{best}"):
        chosen = rms_norm(x)
    with use("native"):
        assert torch.equal(rms_norm(x), chosen)
    with use("native:portable"):
        torch.testing.assert_close(rms_norm(x), chosen)
    if best != "amx":
        with use("native:amx"), pytest.raises(BackendError, match="status 3"):
            rms_norm(x)


def test_special_values() -> None:
    """NaN and infinity survive every conversion of every instruction set; rounding is to nearest even."""
    values = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 65504.0, 6e-8, 1e-40, 3.0e38])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        column = values.to(dtype).view(-1, 1)
        wide = column.repeat(1, 37)
        for name in SETS_HERE:
            with use(f"native:{name}"):
                got = rms_norm(wide, eps=1.0)
            torch.testing.assert_close(got, contract.reference(wide, eps=1.0), equal_nan=True)
    # every float16 and every upper half of a float32 there is: load, multiply by 1, store
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        for name in SETS_HERE:
            with use(f"native:{name}"):
                # the row is one, so x * rstd is exactly weight's factor: weight goes through load and store unchanged
                got = rms_norm(torch.ones(1, 2**16, dtype=dtype), bits.view(dtype), eps=0.0)[0]
                # and with half a last place added, every sum is a tie
                steps = 1 + torch.arange(1 / torch.finfo(dtype).eps) * torch.finfo(dtype).eps
                half = torch.finfo(dtype).eps / 2
                ties = rms_norm(torch.ones(1, len(steps), dtype=dtype), steps.to(dtype), eps=0.0, weight_offset=half)
            assert torch.equal(got.isnan(), bits.view(dtype).isnan())
            assert torch.equal(got.nan_to_num(), bits.view(dtype).nan_to_num())
            assert torch.equal(ties[0], (steps + half).to(dtype))


def test_status_becomes_an_exception() -> None:
    pack, call = native.packer("rms_norm"), native.function("cpu", "rms_norm")
    arguments = (0, 0, 0, 0, 8, 8, 1e-6, 0.0, 0, 0, 1, 0, 1, 0)
    assert call(pack(*arguments)) == 0  # no rows, nothing is read
    assert call(pack(*arguments[:3], -1, *arguments[4:])) == 1
    assert call(pack(*arguments[:8], 0, 1, *arguments[10:])) == 2
    assert call(pack(*arguments[:11], 9, 1, 0)) == 3
    assert "status 2: there is no body" in str(native.failed("rms_norm", 2))


def test_workspaces_are_checked() -> None:
    pack, call = native.packer("attention"), native.function("cpu", "attention")
    arguments = [0] * 9 + [1, 1, 1, 4, 64, 32, 32, 1, 100] + [0] * 15 + [4, 1, -1, -1, 0.0, 1.0, 0, 0, 0, 1, 0]
    assert call(pack(*arguments)) == 1
    ends = torch.tensor([0, 5, 4], dtype=torch.int32)  # what no CPU check has seen: the library looks again
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(BackendError, match=r"attention: .*out of range"):
        torch.ops.blip3o.attention(x, x, x, None, ends, ends, False, -1, -1, 0.0, 1.0, "native")
    with use("native"), pytest.raises(BackendError, match=r"attention: .*does not take torch.float64"):
        attention(*torch.randn(3, 1, 1, 2, 4).double())


def test_without_the_libraries(tmp_path: Path) -> None:
    """A pure install: the same package without lib/ runs on the reference and says what is missing."""
    shutil.copytree(ROOT / "kernels/blip3o_kernels", tmp_path / "blip3o_kernels", ignore=shutil.ignore_patterns("lib"))
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{[path for path in sys.path if 'site-packages' in path]!r}];"
        "import torch, blip3o_kernels as k;"
        f"assert k.__file__.startswith({str(tmp_path)!r}); "
        "x = torch.randn(2, 8); k.rms_norm(x); print(k.explain('rms_norm', x))"
    )
    # -S: no start-up files of site-packages, so no editable install's finder either
    found = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert "rms_norm on cpu torch.float32: reference" in found.stdout
    assert "native: libblip3o_cpu.so is not installed" in found.stdout


def test_triton_stays_optional() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, blip3o_kernels as k;"
        "k.rms_norm(torch.randn(2, 8)); print(k.explain('rms_norm', torch.randn(2, 8)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), capture_output=True)


def test_environment_variable_forces() -> None:
    program = "import torch, blip3o_kernels as k; print(k.explain('rms_norm', torch.randn(2, 8)))"
    run = [sys.executable, "-c", program]
    found = subprocess.run(run, capture_output=True, text=True, env=environment(BLIP3O_BACKEND="reference"), check=True)
    assert "reference (asked for by" in found.stdout
    refused = subprocess.run(run, capture_output=True, text=True, env=environment(BLIP3O_BACKEND="fast"), check=False)
    assert refused.returncode and "BLIP3O_BACKEND: expected one of reference, native, triton" in refused.stderr


def test_build_without_a_compiler(tmp_path: Path) -> None:
    """CMake finds none: a pure install, with a message. It finds one that fails: an error."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs the cmake program on PATH; pip install cmake")
    tools = tmp_path / "bin"
    tools.mkdir()
    bare = {"PATH": str(tools), "HOME": str(tmp_path)}
    command = [cmake, "-S", str(ROOT), "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-G", "Unix Makefiles"]
    for tool in ("make",):
        found = shutil.which(tool) or shutil.which("true")
        assert found is not None
        (tools / tool).symlink_to(found)
    absent = subprocess.run(
        [*command, "-B", str(tmp_path / "1")], capture_output=True, text=True, env=bare, check=False
    )
    assert absent.returncode == 0, absent.stderr
    assert "no C++ compiler found" in absent.stdout
    broken = tools / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    failing = subprocess.run(
        [*command, "-B", str(tmp_path / "2")], capture_output=True, text=True, env=bare, check=False
    )
    assert failing.returncode != 0
