"""The rules of the house that a machine can hold: how imports point, how large files are, what is never written."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from blip3o_kernels import OPS

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("blip3o/**/*.py"), *ROOT.glob("kernels/blip3o_kernels/**/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
NATIVE = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))

# A file, or a folder, of blip3o/ imports only what stands in an earlier line; folders are free inside, but without
# cycles.
LEVELS = (
    ("layers", "flow", "data"),
    ("config", "regression"),
    ("presets", "clip", "vision", "llm", "dit", "decoder", "autoencoder", "weights_files"),
    ("model", "processor", "unet_decoder", "weights_names"),
    ("weights_config", "qwen_processor", "kl_autoencoder"),
    ("weights_released", "weights_qwen"),
    ("weights", "generate", "chat"),
    ("pipeline",),
    ("evaluate",),
    ("train",),
    ("demo", "doctor"),
    ("commands",),
    ("commands_shards", "commands_train"),
    ("cli",),
)
# Against the arrows, when a function runs: Blip3o.from_pretrained is where people look for it.
UPWARD = (("model", "weights"),)
NETWORKS = ("clip", "vision", "llm", "dit", "decoder", "autoencoder")
# Who may import the kernels: the networks' one door, the probability path, and the programs that report on backends.
KERNEL_IMPORTERS = ("layers", "flow", "regression", "demo", "doctor", "cli", "bench")
# What several Triton bodies share, and the parts of one.
SHARED_BY_TRITON = {"__init__", "chunks", "normalise", "normed_rotation", "normed_rotation_backward", "numbers"}
SHARED_BY_TRITON |= {"philox", "rotation", "sums"}
ATTENTION = {f"attention_{part}" for part in ("scores", "forward", "keys", "queries")}  # too large for one file
# Where a library of others may be imported at the top, because it is the well-kept part.
FOREIGN_IMPORTERS = ("processor", "data")


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, both dotted; `top`: when the module is loaded, not when a function runs."""

    module: str
    target: str
    top: bool


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parts = package.split(".")
                above = parts[: len(parts) - child.level + 1] if child.level else []
                source = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(module, f"{source}.{alias.name}", top)
            inner = top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inner and not _type_checking(child))

    yield from walk(tree(path), True)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


ALL = [found for path in SOURCES for found in imports(path)]


def part(name: str) -> str:
    """The file or folder of blip3o/ that a dotted name belongs to; "" for the package itself."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[0] == "blip3o" else ""


def level(name: str) -> int:
    found = [i for i, row in enumerate(LEVELS) if name in row]
    assert found, f"blip3o/{name} stands in no row of LEVELS: say where it belongs"
    return found[0]


def test_imports_point_one_way() -> None:
    wrong = []
    for found in ALL:
        source, target = part(found.module), part(found.target)
        if not found.top and (source, target) in UPWARD:
            continue
        if source and target and source != target and level(target) >= level(source):
            wrong.append(f"{found.module} imports {found.target}")
    assert not wrong


def test_foreign_parameter_names_are_in_the_weights_files_alone() -> None:
    foreign = re.compile(
        r"[qkv]_proj|o_proj|gate_proj|embed_tokens|layernorm|lm_head|to_[qkv]\b|ln_q|cls_token|pos_embed"
    )
    places = {path.stem for path in ROOT.glob("blip3o/**/*.py") if foreign.search(path.read_text())}
    assert places and all(place.startswith("weights") for place in places), places


def test_networks_import_only_their_configuration_and_layers() -> None:
    seen = {(part(i.module), part(i.target)) for i in ALL if part(i.module) in NETWORKS and part(i.target)}
    assert {target for _, target in seen} <= {"config", "layers"}, seen
    assert not [i for i in ALL if part(i.module) in ("flow", "layers") and part(i.target)]


def test_kernels_have_one_door() -> None:
    doors = {part(i.module) for i in ALL if i.target.startswith("blip3o_kernels") and i.module.startswith("blip3o.")}
    assert doors <= set(KERNEL_IMPORTERS), doors
    of_flow = {
        i.target.removeprefix("blip3o_kernels.") for i in ALL if part(i.module) == "flow" and "kernels" in i.target
    }
    assert of_flow and all(name.startswith("flow_") for name in of_flow), of_flow
    back = [i for i in ALL if i.module.startswith("blip3o_kernels") and i.target.split(".")[0] == "blip3o"]
    assert not back


def test_no_cycles() -> None:
    """Among the modules, at load time, packages' own __init__ included."""
    modules = {module_of(path) for path in SOURCES}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in ALL:
        if found.top:
            target = found.target if found.target in modules else found.target.rpartition(".")[0]
            if target in modules and target != found.module:
                edges[found.module].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(modules):
        visit(module, ())


def test_large_libraries_of_others_load_late() -> None:
    """transformers and diffusers cost seconds and are optional: functions import them, modules do not."""
    early = [i for i in ALL if i.top and i.target.split(".")[0] in ("transformers", "diffusers", "triton")]
    early = [i for i in early if part(i.module) not in FOREIGN_IMPORTERS]
    assert {i.module.rpartition(".")[0] for i in early} <= {"blip3o_kernels.triton_ops"}, early


def test_folders() -> None:
    """kernels/__init__.py would shadow Hugging Face's `kernels`; tests/__init__.py would put the root on sys.path."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()
    vague = re.compile(r"util|misc|common|helper|manager|\bbase\b")
    assert not [path for path in (*SOURCES, *NATIVE, *TESTS) if vague.search(path.stem)]


def test_one_op_one_word() -> None:
    """An op's name is its files' name everywhere, and every body that is declared has its file."""
    names = {op.name for op in OPS}
    kernels = ROOT / "kernels/blip3o_kernels"
    files = {path.stem for path in kernels.glob("ops/*.py")} - {"__init__"}
    assert files == names
    assert {path.stem for path in kernels.glob("native_ops/*.py")} - {"__init__"} <= names
    assert {path.stem for path in kernels.glob("triton_ops/*.py")} - SHARED_BY_TRITON - ATTENTION <= names
    assert {path.stem for path in ROOT.glob("csrc/cpu/*.cpp")} - {"instruction_sets", "memory", "shortcut"} <= names
    cuda = {path.stem.removesuffix("_backward") for path in ROOT.glob("csrc/cuda/*.cu")}
    assert cuda - {"library", "norm", "norm_forward", "hopper", "attention_hopper"} <= names
    places = {
        ("native", "cpu"): "csrc/cpu/{}.cpp",
        ("native", "cuda"): "csrc/cuda/{}.cu",
        ("triton", "cuda"): "kernels/blip3o_kernels/triton_ops/{}.py",
        ("triton", "cpu"): "kernels/blip3o_kernels/triton_ops/{}.py",
    }
    for op in OPS:
        for body in op.bodies:
            assert (ROOT / places[body.backend, body.device].format(op.name)).exists(), (op.name, body.backend)


def lines_of_code(path: Path) -> int:
    """Lines that hold code: blank lines, comments and docstrings are free, so that explaining is."""
    if path.suffix != ".py":
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        return sum(bool(line.strip()) and not line.strip().startswith("//") for line in text.splitlines())
    free = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in free:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize(
    ("paths", "budget"), [(SOURCES, 300), (NATIVE, 350), (TESTS, 500)], ids=["py", "native", "tests"]
)
def test_size(paths: list[Path], budget: int) -> None:
    assert paths
    paths = [path for path in paths if path.name != "blip3o.h"]  # one list of all the structs there are
    large = {str(path.relative_to(ROOT)): lines_of_code(path) for path in paths if lines_of_code(path) > budget}
    assert not large, f"over {budget} lines of code, split by subject: {large}"


def offences(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        where = f"{path.relative_to(ROOT)}:{node.lineno}" if hasattr(node, "lineno") else ""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "torch.load", "os.system", "pickle.load", "pickle.loads"):
                yield f"{where} {name}()"
            if name.endswith((".extractall", ".extract")):
                yield f"{where} {name}(): a path in an archive may point anywhere"
            if name == "getattr" and len(node.args) == 3:
                yield f"{where} getattr with a default"
            if any(
                word.arg in ("shell", "trust_remote_code") and ast.unparse(word.value) != "False"
                for word in node.keywords
            ):
                yield f"{where} shell=True or trust_remote_code"
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            yield f"{where} except Exception"
    for found in imports(path):
        if found.target.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle"):
            yield f"{found.module} imports {found.target}"


def test_nothing_unsafe_or_hiding() -> None:
    assert not [offence for path in SOURCES for offence in offences(path)]


def test_the_environment_is_read_in_one_place() -> None:
    """BLIP3O_BACKEND in dispatch.py; triton's own switch where the Triton bodies are."""
    readers = {
        module_of(path)
        for path in SOURCES
        if module_of(path).startswith("blip3o_kernels") and re.search(r"os\.environ|getenv", path.read_text())
    }
    assert readers == {"blip3o_kernels.dispatch", "blip3o_kernels.triton_ops"}


def configuration_fields() -> Iterator[tuple[str, str]]:
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Recipe")):
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                        yield node.name, statement.target.id


def reads(node: ast.AST) -> Iterator[str]:
    """Names read as attributes, other than by the validation of a configuration itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield child.attr
        yield from reads(child)


def test_every_configuration_field_is_read() -> None:
    read = {name for path in SOURCES for name in reads(tree(path))}
    fields = list(configuration_fields())
    assert len(fields) > 20
    assert not [f"{owner}.{name}" for owner, name in fields if name not in read]
