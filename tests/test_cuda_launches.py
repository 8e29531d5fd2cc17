"""The CUDA launches of 4b's and 8b's sizes are ones that a GPU takes, and the check of that can fail."""

from __future__ import annotations

import re
from subprocess import CompletedProcess
from types import SimpleNamespace

import cuda_launches
import pytest
import torch
from cuda_launches import Call, Launch

from blip3o_kernels import BackendError, native

CODES = {"kernel": {gpu: [64, 1024, 0, "load16"] for gpu in cuda_launches.GPUS}}


@pytest.mark.gpu_code
@pytest.mark.program("tests/cuda_launches.py")
def test_launches_at_full_size(program: CompletedProcess[str]) -> None:
    assert program.returncode == 0, program.stdout + program.stderr
    for function in native.ON_CUDA:
        assert re.search(rf"^\S.*: {function}: .* blocks of ", program.stdout, re.MULTILINE), f"{function}: no launch"


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch("kernel", (132, 1, 1), (512, 1, 1), 90 * 1024), ""),
        (Launch("kernel", (1, 1, 1), (40, 1, 1), 0), "whole warps"),
        (Launch("kernel", (1, 1, 1), (1024, 2, 1), 0), "1024 at most"),
        (Launch("kernel", (2**31, 1, 1), (32, 1, 1), 0), "no GPU has such a grid"),
        (Launch("kernel", (1, 2**16, 1), (32, 1, 1), 0), "no GPU has such a grid"),
        (Launch("kernel", (0, 1, 1), (32, 1, 1), 0), "no GPU has such a grid"),
        (Launch("kernel", (1, 1, 1), (32, 1, 1), 99 * 1024), "with 1024 of its own, a block has 101376 on sm_120"),
        (Launch("kernel", (1, 1, 1), (1024, 1, 1), 0), ""),
        (Launch("unheard of", (1, 1, 1), (32, 1, 1), 0), "--update"),
    ],
    ids=str,
)
def test_what_no_gpu_takes_is_told(launch: Launch, words: str) -> None:
    wrong = list(cuda_launches.illegal(Call("rope", b"", [launch]), CODES, "sm_120"))
    assert bool(wrong) is bool(words) and words in "".join(wrong)


def test_too_many_registers_are_told() -> None:
    codes = {"kernel": {gpu: [96, 0, 0, ""] for gpu in cuda_launches.GPUS}}
    launch = Launch("kernel", (1, 1, 1), (768, 1, 1), 0)
    assert "96 registers for 768 threads" in "".join(
        cuda_launches.illegal(Call("rope", b"", [launch]), codes, "sm_90a")
    )


def test_idle_gpus_and_wrong_streams_are_told() -> None:
    def call(blocks: int, stream: int = cuda_launches.STREAM) -> Call:
        packed = native.packer("rope")(*[0] * (len(native.FORMATS["rope"]) - 1), stream)
        return Call("rope", packed, [Launch("kernel", (blocks, 1, 1), (128, 1, 1), 0)])

    assert not list(cuda_launches.unfit(call(64), 2**20)) and not list(cuda_launches.unfit(call(1), 100))
    assert "3 blocks for" in "".join(cuda_launches.unfit(call(3), 2**20))
    assert "8192 threads for" in "".join(cuda_launches.unfit(call(64), 2**30))
    assert "another stream" in "".join(cuda_launches.unfit(call(64, 0), 2**20))
    assert "0 launches" in "".join(cuda_launches.unfit(Call("rope", b""), 2**20))


@pytest.mark.parametrize("op", native.ON_CUDA)
def test_a_refused_launch_names_the_op_and_runs_on_its_device(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """native.cuda_call, with a library that refuses: the struct's last member is the current stream of the tensor's
    device, asked for with that device current; the exception says which op, and why."""
    current, packed = [0], []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    def refuse(arguments: bytes) -> int:
        packed.append((arguments, current[-1]))
        return 1

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=1000 + current[-1]))
    monkeypatch.setattr(native, "function", lambda kind, name: refuse)
    call, count = native.cuda_call(op), len(native.FORMATS[op]) - 3
    with pytest.raises(BackendError, match=rf"^{op.removesuffix('_backward')}: .* an argument is out of range"):
        call(SimpleNamespace(device=torch.device("cuda", 3)), *[0] * count)
    assert packed == [(native.packer(op)(*[0] * count, 0, 0, 1003), 3)]
