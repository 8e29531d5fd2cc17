"""Generated faults: every additive term of every backward pass is dropped once, and the conformance bound must notice.

    python tests/faults.py native            the C++ of csrc/cpu, with what calls it
    python tests/faults.py native:amx        the same in bfloat16, for the bodies in tiles; or native:avx512_bf16
    python tests/faults.py triton            the Triton kernels, in Triton's interpreter, with what calls them

A copy of the package is made in which each operand of a `+`, `-`, `+=` or `-=` passes through a switch: in C++ as
`KEEP(number) * operand`, in Python as `keep_term(number, operand)`. The switch lets integers and pointers through, so
only terms of sums of floating-point numbers are faults, and only those that a backward pass of a sample reaches. Each
of them in turn becomes 0 during the backward passes; a fault that no sample shows is a hole in the tests.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rebuilt import PACKAGE, ROOT, build_library, copy_package, run_on_copy

if TYPE_CHECKING:
    from torch import Tensor

    from blip3o_kernels.dispatch import Op

MOST = 100_000  # numbers below are C++, from here on Python

# Terms that nobody can miss: (op, file, a part of the line) -> why.
HARMLESS = {
    ("gated_residual", "normalise.py", "plain += dy"): "the sum of dy, which layer_norm and modulate alone need",
    ("gated_residual", "normalise.py", "total += u"): "the mean of dy, which only a centred norm takes off",
    ("gated_residual", "normalise.py", "- mean"): "the mean, which is 0 in a norm that is not centred",
    ("timestep_embedding", "timestep_embedding.py", "1 / 5040"): "the ends of a series, below the last bit of float32",
    ("timestep_embedding", "timestep_embedding.py", "1 / 720"): "the ends of a series, below the last bit of float32",
    ("timestep_embedding", "timestep_embedding.py", "quarter = "): "any quarter of a turn near by will do",
    ("qk_norm_rope", "normalise.h", "left[r]"): "it mends the last bits of a mean",
    ("attention", "scores.h", "return quotient + (x - quotient * sum)"): "it mends the last bit of a quotient",
    (
        "linear_cross_entropy",
        "fused_cross_entropy.h",
        "f * 1.535",
    ): "the end of a series, below the last bit of bfloat16",
    ("attention", "attention_tiles.h", "p = p * f + 5.59"): "the end of a series, below the last bit of bfloat16",
}

SWITCH = r"""
#include <type_traits>
#include <utility>
extern "C" {
extern int blip3o_fault, blip3o_recording;
extern unsigned char blip3o_reached[];
}
template <int N> struct Keep {};
template <class T, class = void> struct Element { typedef T type; };
template <class T>
struct Element<T, std::void_t<decltype(std::declval<T&>()[0])>> {
  typedef std::remove_reference_t<decltype(std::declval<T&>()[0])> type;
};
template <int N, class T>
__attribute__((always_inline)) static inline T operator*(Keep<N>, T term) {
  if constexpr (!std::is_pointer<T>::value && std::is_floating_point<typename Element<T>::type>::value) {
    if (blip3o_recording) blip3o_reached[N] = 1;
    if (blip3o_fault == N) return T{};
  }
  return term;
}
#define KEEP(n) Keep<n>{}
"""

SWITCH_PYTHON = """
fault, recording, reached = -1, False, set()

def keep_term(number, term):
    kind = str(getattr(term, "dtype", type(term).__name__))
    if not kind.startswith(("fp", "bf", "float", "torch.float", "torch.bfloat")):
        return term
    if recording:
        reached.add(number)
    if fault != number:
        return term
    if not hasattr(term, "to") or kind.startswith("torch"):
        return term * 0
    import triton.language as tl
    return (term.to(tl.float32) * 0.0).to(term.dtype)
"""


def matches(known_as: tuple[str, str, str], op: str, path: str, text: str) -> bool:
    name, file, part = known_as
    return name == op and path.endswith(file) and part in text


class Sites:
    """Where the switches are: number -> (file, line, the line's text)."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, int, str]] = {}
        self.next = {".cpp": 0, ".py": MOST}

    def add(self, path: Path, lines: list[str], line: int) -> int:
        kind = ".py" if path.suffix == ".py" else ".cpp"
        number = self.next[kind]
        self.next[kind] += 1
        self.found[number] = (str(path.relative_to(ROOT)), line, lines[line - 1].strip())
        return number


def term_start(text: str, operator: int) -> int | None:
    """Where the first term of the sum begins whose operator stands at `operator`; None if it is not the first one."""
    depth, i = 0, operator - 1
    while i >= 0:
        letter = text[i]
        if letter in ")]}":
            depth += 1
        elif letter in "([{" and depth:
            depth -= 1
        elif not depth:
            if re.match(r" [+-] ", text[i - 1 : i + 2]):
                return None
            if letter in "([{,;?=&|!" or (letter == ":" and ":" not in (text[i - 1], text[i + 1])):
                break
            if letter in "<>" and text[i + 1] == " ":  # a comparison or a shift; the brackets of templates touch
                break
            if re.match(r"return\b", text[max(i - 5, 0) : i + 2]) and text[i] == "n":
                break
        i -= 1
    return i + 1 + len(text[i + 1 :]) - len(text[i + 1 :].lstrip())


def instrument_cpp(path: Path, sites: Sites) -> str:
    lines = path.read_text().splitlines()
    text = re.sub(r"//[^\n]*", lambda found: " " * len(found[0]), "\n".join(lines))
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    inserted: dict[int, str] = {}
    for found in re.finditer(r"(?<=[\w)\]}] )([+-])=?(?=\s)", text):
        number = text.count("\n", 0, found.start()) + 1
        line, depth = lines[number - 1], 0
        for letter in reversed(text[: found.start()]):  # inside [...], there are only indices
            depth += (letter == "]") - (letter == "[")
            if depth < 0 or letter in ";{}":
                break
        if (
            depth < 0
            or line.lstrip().startswith("#")
            or re.search(r"\b(case|constexpr|static_assert|template)\b", line)
        ):
            continue
        after = found.end() + len(text[found.end() :]) - len(text[found.end() :].lstrip())
        places = [after] if found[0].endswith("=") else [term_start(text, found.start() - 1), after]
        for place in places:
            if place is not None and place not in inserted:
                inserted[place] = f"KEEP({sites.add(path, lines, text.count(chr(10), 0, place) + 1)}) * "
    for place in sorted(inserted, reverse=True):
        text = text[:place] + inserted[place] + text[place:]
    return text


class _Instrument(ast.NodeTransformer):
    def __init__(self, path: Path, sites: Sites) -> None:
        self.path, self.sites, self.lines = path, sites, path.read_text().splitlines()

    def kept(self, term: ast.expr) -> ast.expr:
        if ast.unparse(term).startswith("tl.zeros("):
            return term
        number = self.sites.add(self.path, self.lines, term.lineno)
        call = ast.Call(ast.Name("keep_term", ast.Load()), [ast.Constant(number), term], [])
        return ast.copy_location(call, term)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        sums = (ast.Add, ast.Sub)
        inner = isinstance(node.left, ast.BinOp) and isinstance(node.left.op, sums)
        self.generic_visit(node)
        if isinstance(node.op, sums):
            node.left = node.left if inner else self.kept(node.left)
            node.right = self.kept(node.right)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        self.generic_visit(node)
        if isinstance(node.op, ast.Add | ast.Sub):
            node.value = self.kept(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if ast.unparse(node.func) in ("product", "tl.dot") and len(node.args) == 3:  # a b + sums
            node.args = [self.kept(node.args[0]), node.args[1], self.kept(node.args[2])]
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node


def instrument_python(path: Path, sites: Sites) -> str:
    tree = _Instrument(path, sites).visit(ast.parse(path.read_text()))
    position = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.Import | ast.ImportFrom))
    position += ast.unparse(tree.body[position]).startswith("from __future__")
    tree.body.insert(position, ast.parse("from blip3o_kernels.faults import keep_term").body[0])
    return ast.unparse(ast.fix_missing_locations(tree))


def make_copy(folder: Path, backend: str) -> Sites:
    """The package in `folder`, with switches; for native with a library of the portable bodies alone."""
    sites, target = Sites(), copy_package(folder)
    (target / "faults.py").write_text(SWITCH_PYTHON)
    for path in sorted(PACKAGE.glob(f"{backend.partition(':')[0]}_ops/*.py")):
        if path.stem not in ("__init__", "numbers"):
            (target / path.relative_to(PACKAGE)).write_text(instrument_python(path, sites))
    if backend != "triton":
        native = folder / "csrc"
        shutil.copytree(ROOT / "csrc", native)
        for path in sorted(ROOT.glob("csrc/cpu/*")):
            if path.stem not in ("vector", "instruction_sets", "philox", "memory", "shortcut"):
                (native / path.relative_to(ROOT / "csrc")).write_text(instrument_cpp(path, sites))
        if backend == "native":
            for name in ("instruction_sets.h", "instruction_sets.cpp"):
                sets = native / "cpu" / name
                sets.write_text(sets.read_text().replace("defined(__x86_64__)", "0"))
        sets = native / "cpu/instruction_sets.cpp"
        sets.write_text(
            sets.read_text() + f"int blip3o_fault = -1, blip3o_recording = 0;\nunsigned char blip3o_reached[{MOST}];\n"
        )
        (folder / "switch.h").write_text(SWITCH)
        flags = ["-O1", "-include", str(folder / "switch.h")]
        build_library(folder, sorted(native.glob("cpu/*.cpp")), flags)
    return sites


def search(backend: str, folder: Path, sites: Sites, only: str, log: Callable[[str], None]) -> int:
    """Drops every term, prints a line for each, and returns how many no sample noticed."""
    import torch
    from conformance import bound, evaluate, expectation, violations

    import blip3o_kernels
    from blip3o_kernels import faults, native  # type: ignore[attr-defined]
    from blip3o_kernels.bodies import body

    assert Path(blip3o_kernels.__file__).is_relative_to(folder)
    torch.set_num_threads(1)
    library = native._CPU if backend != "triton" else None
    kind, dtype = backend.partition(":")[0], torch.bfloat16 if ":" in backend else torch.float32
    if library is not None:
        reached = (ctypes.c_ubyte * MOST).in_dll(library, "blip3o_reached")

    @contextmanager
    def switched(fault: int, recording: bool) -> Iterator[None]:
        faults.fault, faults.recording = fault, recording
        if library is not None:
            ctypes.c_int.in_dll(library, "blip3o_fault").value = fault
            ctypes.c_int.in_dll(library, "blip3o_recording").value = recording
        yield
        faults.fault, faults.recording = -1, False
        if library is not None:
            ctypes.c_int.in_dll(library, "blip3o_fault").value = -1
            ctypes.c_int.in_dll(library, "blip3o_recording").value = 0

    def gradients_of(op: Op, arguments: dict[str, object], fault: int, recording: bool) -> dict[str, Tensor]:
        """With the switches on in the backward pass; in both, if the body's gradients come with its result."""
        in_one = not hasattr(body(op.name, kind), "backward")
        with blip3o_kernels.use(backend), switched(fault, recording) if in_one else nullcontext():
            backward = nullcontext if in_one else partial(switched, fault, recording)
            return evaluate(op, op.function, arguments, None, backward)

    missed = total = 0
    for op in blip3o_kernels.OPS:
        if not op.differentiable or only not in ("", op.name) or not any(b.backend == kind for b in op.bodies):
            continue
        known, reaching = {}, {}
        for sample in op.samples(dtype):
            arguments = bound(op, sample)
            expected = expectation(op, backend, arguments)
            faults.reached.clear()
            if library is not None:
                ctypes.memset(reached, 0, MOST)
            got = gradients_of(op, arguments, -1, True)
            broken = list(violations(got, expected))
            assert not broken, f"without a fault: {op.name} {sample.name}: {broken}"
            numbers = set(faults.reached)
            if library is not None:
                numbers |= {i for i, hit in enumerate(bytes(reached)) if hit}
            known[sample.name] = (arguments, expected)
            for number in numbers:
                reaching.setdefault(number, []).append(sample.name)
        for number, names in sorted(reaching.items()):
            total += 1
            path, line, text = sites.found[number]
            caught = ""
            for name in names:
                arguments, expected = known[name]
                found = next(violations(gradients_of(op, arguments, number, False), expected), "")
                if found:
                    caught = f"{name}, {found.split(':')[0]}"
                    break
            reason = next((why for known_as, why in HARMLESS.items() if matches(known_as, op.name, path, text)), "")
            missed += not (caught or reason)
            verdict = caught or (f"harmless: {reason}" if reason else "MISSED")
            log(f"{op.name:22} {path}:{line} {text}  ->  {verdict}")
    log(f"{backend}: {total} terms dropped, {missed} missed")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backend", choices=("native", "native:avx512_bf16", "native:amx", "triton"))
    parser.add_argument("--op", default="", help="only this op")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        sites = Sites()
        sites.found = {int(n): tuple(at) for n, at in json.loads((options.inside / "sites.json").read_text()).items()}
        return min(search(options.backend, options.inside, sites, options.op, print), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sites.json").write_text(json.dumps(make_copy(folder, options.backend).found))
        command = [__file__, options.backend, "--op", options.op, "--inside", name]
        return run_on_copy(folder, command, **({"TRITON_INTERPRET": "1"} if options.backend == "triton" else {}))


if __name__ == "__main__":
    sys.exit(main())
