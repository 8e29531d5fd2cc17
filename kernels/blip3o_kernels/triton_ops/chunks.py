"""How Triton kernels cut contiguous samples, by shape alone as csrc/cpu/chunks.h does: the unit of work, of sums."""

import triton
import triton.language as tl

CHUNK = 2048  # elements a program handles at once: with 4 warps two 16-byte loads of bfloat16 a thread and tensor
MAX_SUMS = 4096  # programs of a kernel that sums: enough to fill a GPU, few enough for one program to add up


def cut(elements: int) -> tuple[int, int, int]:
    """The chunks of a sample, the elements of a chunk, and warps for it."""
    chunk = min(triton.next_power_of_2(max(elements, 1)), CHUNK)
    return triton.cdiv(elements, chunk), chunk, max(chunk // 512, 1)


def sums_each(samples: int, each: int) -> int:
    """Programs a sample of `each` chunks, where a program gives one sum: of every so many-th chunk."""
    return max(min(each, MAX_SUMS // samples), 1)


def tile(samples: int, each: int) -> tuple[int, int]:
    """ROWS and COLUMNS of what `sample_sums` loads at once: all sums of some samples."""
    columns = triton.next_power_of_2(each)
    return min(max(MAX_SUMS // columns, 1), triton.next_power_of_2(samples)), columns


@triton.jit
def sample_sums(sums_ptr, samples, each, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS]: of each sample from `first` on, what its `each` sums add up to; 0 where there is none."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < samples) & (columns < each)
    return tl.sum(tl.load(sums_ptr + rows * each + columns, mask=inside, other=0.0), axis=1)
