"""The CUDA sources without a GPU: they compile for every architecture, loads are 16 bytes."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip3o_kernels import native

pytestmark = pytest.mark.gpu_code

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90a", "100", "120")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SCRIPT = ROOT / "csrc/cuda/build.cmake"
# Kernels that compute in double precision, and why.
IN_DOUBLE = {
    "embedding_kernel": "frequencies and angles: at 1000 rad a float is wrong by 6e-5",
    "embedding_backward_kernel": "the same angles",
}


@pytest.fixture(scope="module")
def library() -> Path:
    """libblip3o_cuda.so for every architecture: the target cuda_all, which builds again only what has changed."""
    cmake = shutil.which("cmake")
    if NVCC is None or cmake is None:
        pytest.skip("the CUDA sources are not checked: needs nvcc, CUDA's compiler, and cmake on PATH")
    folder = ROOT / "build/cuda"
    for command in ([cmake, "-S", str(ROOT), "-B", str(folder)], [cmake, "--build", str(folder), "-t", "cuda_all"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder / "cuda_all/libblip3o_cuda.so"


def test_compiles_without_warnings(library: Path) -> None:
    """Registers and spills are tests/cuda_code.py's."""
    report = Path(f"{library}.txt").read_text()
    assert "warning" not in report, report
    for arch in ARCHS:
        kernels = re.findall(rf"Compiling entry function '\w+' for 'sm_{arch}'", report)
        assert len(kernels) > 50, f"{len(kernels)} kernels for sm_{arch}"


def machine_code(library: Path) -> str:
    assert NVCC is not None
    folders = [Path(NVCC).resolve().parent]
    triton = find_spec("triton")  # brings a cuobjdump, should nvcc come without
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    dump = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    assert dump is not None
    command = [dump, "-sass", "-arch", "sm_90a", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_instructions(library: Path) -> None:
    """The machine code holds what is meant: 16-byte loads and stores, no atomics, doubles only where it says why."""
    code = machine_code(library)
    assert "LDG.E.128" in code and "STG.E.128" in code
    assert not re.search(r"\s(RED|ATOM|ATOMG)\b", code)
    kernels = re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]
    # The last word of a 16-byte store that came apart; float32's attention stores rows that are not aligned so.
    apart = [kernel.split(maxsplit=1)[0] for kernel in kernels if re.search(r"STG\.E \S*\[R\d+\.64\+0xc\]", kernel)]
    assert not [name for name in apart if "MultiplyAdds" not in name]
    doubles = [kernel.split(maxsplit=1)[0] for kernel in kernels if re.search(r"\s(DADD|DMUL|DFMA)\b", kernel)]
    named = {name: [kernel for kernel in doubles if re.search(rf"\d{name}", kernel)] for name in IN_DOUBLE}
    assert all(named.values()) and len(doubles) == sum(map(len, named.values())), doubles


def test_instructions_of_attention(library: Path) -> None:
    """Tiles come by asynchronous copies; 16-bit products are of tensor cores, those of float32 are not."""
    pattern = r"Function : (\S*\d+attention_(?:forward|backward)I\S*)(.*?)(?=Function : |\Z)"
    kernels = re.findall(pattern, machine_code(library), re.DOTALL)
    assert len(kernels) > 20
    for name, code in kernels:
        tensor_cores, float32 = "TensorCores" in name, "MultiplyAdds" in name
        assert tensor_cores != float32 and "LDGSTS.E.BYPASS.128" in code
        assert all((part in code) == tensor_cores for part in ("HMMA.16816.F32", "LDSM.16.MT88.4", "HMMA"))


def test_instructions_of_hopper(library: Path) -> None:
    """Attention for sm_90a: products of warpgroups, which nothing makes wait for one another, tiles by TMA, barriers
    that count, registers moved to who needs them."""
    assert "wgmma" not in Path(f"{library}.txt").read_text()  # a remark that products are serialised
    kernels = re.findall(
        r"Function : \S*(?:forward|gradients)_kernel\S*Shape(.*?)(?=Function : |\Z)", machine_code(library), re.DOTALL
    )
    assert len(kernels) == 16
    for code in kernels:
        for instruction in ("HGMMA.64x", "UTMALDG.4D", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "USETMAXREG", "MUFU.EX2"):
            assert instruction in code
        assert "HMMA.16816" not in code and "LDL" not in code and "STL" not in code
        # hold() in hopper.cuh: the exponentials stay before the wait for what they hide behind.
        assert re.search(r"MUFU\.EX2(?:.*\n){1,40}.*NANOSLEEP(?:.*\n){1,20}.*WARPGROUP\.DEPBAR", code)


def test_library_loads_without_a_driver(library: Path) -> None:
    """The CUDA runtime is linked in, so the library needs no driver until it is called, and every function is there."""
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
    loaded = ctypes.CDLL(str(library))
    assert loaded.blip3o_cuda_version() == native.VERSION
    for name in re.findall(r"\bblip3o_cuda_\w+(?=\()", (ROOT / "csrc/blip3o.h").read_text()):
        assert loaded[name]
    call = loaded.blip3o_cuda_rms_norm
    call.argtypes = [ctypes.c_char_p]
    assert call(native.packer("rms_norm")(0, 0, 0, -1, 8, 8, 1e-6, 0.0, 0, 0, 1, 0, 0, 0)) == 1


def test_a_failing_nvcc_costs_only_cuda(tmp_path: Path) -> None:
    """With REQUIRED off, as at install, a failure is a warning and leaves no library; with it on, an error."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs the cmake program on PATH; pip install cmake")
    output = tmp_path / "libblip3o_cuda.so"
    define = ["-DNVCC=/bin/false", "-DHOST_CXX=c++", "-DARCHS=90a", "-DSOURCES=a.cu", f"-DOUTPUT={output}"]
    for required, status in (("OFF", 0), ("ON", 1)):
        run = subprocess.run(
            [cmake, *define, f"-DREQUIRED={required}", "-P", str(SCRIPT)], capture_output=True, text=True, check=False
        )
        assert run.returncode == status and "nvcc failed" in run.stderr and not output.exists()
