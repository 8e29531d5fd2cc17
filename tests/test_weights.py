"""Model folders: what is written comes back bit for bit; whatever is damaged is named; nothing half-written is seen."""

import json
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o import weights
from blip3o.data.words import SPECIAL
from blip3o.generate import generate
from blip3o.model import Blip3o
from blip3o.processor import Processor
from blip3o.weights import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    CorruptModel,
    check_folder,
    commit_folder,
    from_pretrained,
    save_pretrained,
    sha256,
    staging,
)

FILES = (CONFIG, MANIFEST, WEIGHTS, TOKENIZER)


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of a good model folder, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def sign(folder: Path) -> None:
    """Make the manifest fit whatever the files are now."""
    sums = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n")


# round trips


def test_a_model_comes_back_bit_for_bit(lively: Blip3o, model_folder: Path) -> None:
    model, processor = from_pretrained(model_folder)
    assert sorted(path.name for path in model_folder.iterdir()) == sorted(FILES)
    assert model.config == lively.config and not model.training
    own, loaded = lively.state_dict(), model.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert processor.image_size == model.config.clip.image_size
    said = ["a red circle"]
    assert torch.equal(generate(lively, Processor(), said, steps=2), generate(model, processor, said, steps=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(model_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, processor = from_pretrained(model_folder)
    save_pretrained(model.to(dtype), processor, tmp_path / "half")
    loaded, _ = from_pretrained(tmp_path / "half")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, model.state_dict()[name])


def test_a_text_path_will_do(folder: Path) -> None:
    model, processor = from_pretrained(str(folder))
    save_pretrained(model, processor, str(folder))
    from_pretrained(str(folder))


def test_loaded_weights_outlive_their_file(folder: Path) -> None:
    model, _ = from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (folder / WEIGHTS).stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# damage


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model folder .*nowhere does not exist"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CorruptModel, match=r"file is no model folder: it has no manifest\.json"):
        from_pretrained(tmp_path / "file")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("damage", [flip, cut, longer, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, WEIGHTS])
def test_every_damage_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    with pytest.raises(CorruptModel, match=rf"model/{name} is (corrupt: its SHA-256 sum|missing)"):
        from_pretrained(folder)


def test_every_bit_of_the_weights_counts(folder: Path) -> None:
    """One flipped bit at a time, from the header to the last weight."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    for place in [0, 7, 8, 100, *range(1000, len(content), len(content) // 8), len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(CorruptModel, match=WEIGHTS):
            from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not readable JSON"),
        ("\udcff", "manifest.json is not readable JSON"),
        ("[" * 100_000, "manifest.json is not readable JSON"),
        ('{"../model/config.json": ""}', r"must name files of its own folder, got '\.\./model/config\.json'"),
        ('{"/dev/null": ""}', "must name files of its own folder, got '/dev/null'"),
        ("[]", "manifest.json must map file names"),
        ("{}", "config.json has no sum in manifest.json"),
        ('{"config.json": 3}', "config.json is corrupt"),
        ('{"another": "00"}', "another is missing"),
    ],
)
def test_a_damaged_manifest(folder: Path, text: str, message: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptModel, match=message):
        from_pretrained(folder)


def test_bytes_behind_the_manifest(folder: Path) -> None:
    """Which mean nothing to JSON, but were not written."""
    with (folder / MANIFEST).open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptModel, match=r"manifest\.json is not as it was written"):
        from_pretrained(folder)


def test_a_missing_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CorruptModel, match=r"model is no model folder: it has no manifest\.json"):
        from_pretrained(folder)


# files that are whole, but not what this version writes


def edit_config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def offer_pickle(folder: Path) -> None:
    torch.save({"queries": torch.zeros(2)}, folder / WEIGHTS)


def short_vocabulary(folder: Path) -> None:
    values = json.loads((folder / TOKENIZER).read_text())
    values["model"]["vocab"]["<eos>"], values["model"]["vocab"]["<pad>"] = 0, 2
    (folder / TOKENIZER).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_config(lambda c: c.update(colour=3)), r"model: Blip3oConfig: unknown fields \['colour'\]"),
        (edit_config(lambda c: c.pop("name")), r"missing fields \['name'\]"),
        (edit_config(lambda c: c.update(num_queries="4")), "num_queries must be of type int, got '4'"),
        (edit_config(lambda c: c.update(num_queries=0)), "num_queries must be positive, got 0"),
        (edit_config(lambda c: c.update(image_token=5)), "tokenizer.json does not fit config.json: <image> is not 5"),
        (lambda folder: (folder / CONFIG).write_text("not JSON"), "config.json is not readable JSON"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "Blip3oConfig must be a table of fields"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "config.json is not readable JSON"),
        (lambda folder: (folder / TOKENIZER).write_text("{}"), "tokenizer.json is not a tokenizer.json"),
        (short_vocabulary, "must hold a WordLevel vocabulary that begins with"),
        (edit_config(lambda c: c.update(num_queries=5)), r"queries has shape \[4, 32\], expected \[5, 32\]"),
        (edit_tensors(lambda t: t.pop("queries")), "does not fit the model: missing queries"),
        (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "does not fit the model: unexpected extra"),
        (edit_tensors(lambda t: t.update(queries=torch.zeros(4, 31))), r"queries has shape \[4, 31\], expected"),
        (
            edit_tensors(lambda t: t.update(queries=t["queries"].double())),
            "queries has dtype torch.float64, expected torch.float32",
        ),
        (edit_tensors(lambda t: t.update(queries=t["queries"].bfloat16())), r"dtype torch\.(float32|bfloat16)"),
        (edit_tensors(lambda t: t.clear()), r"missing .*dit\.blocks\.\{0-1\}\.mlp\.down\.weight.* queries"),
        (offer_pickle, "model.safetensors is not a readable safetensors file"),
        (lambda folder: cut(folder / WEIGHTS), "model.safetensors is not a readable safetensors file"),
    ],
)
def test_a_whole_file_of_another_kind(folder: Path, edit: Callable[[Path], None], message: str) -> None:
    edit(folder)
    sign(folder)
    with pytest.raises(CorruptModel, match=message) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (os.environ["BLIP3O_TEST_BOMB"],))


def test_no_pickle_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the weights nor in their place."""
    monkeypatch.setenv("BLIP3O_TEST_BOMB", str(tmp_path / "exploded"))
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    from_pretrained(folder)
    (folder / WEIGHTS).rename(folder / "moved")
    with pytest.raises(CorruptModel, match=r"model\.safetensors is missing"):
        from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    sign(folder)
    with pytest.raises(CorruptModel, match=r"model\.safetensors is not a readable safetensors file"):
        from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


def test_too_many_words_for_the_model(folder: Path) -> None:
    edit_config(lambda c: c["llm"].update(vocab_size=len(SPECIAL)))(folder)  # type: ignore[attr-defined]
    sign(folder)
    with pytest.raises(CorruptModel, match=r"it has \d+ words, the model 8"):
        from_pretrained(folder)


# commits


def content(folder: Path) -> str:
    return (check_folder(folder, "value") / "value").read_text()


def commit(folder: Path, value: str) -> None:
    staged = staging(folder)
    (staged / "value").write_text(value)
    (staged / "more").write_text(value * 1000)
    commit_folder(staged, folder)


class Killed(BaseException):
    """Stands for a process that ends here."""


def deaths(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[int]:
    """Let the process die before the `at`-th change to the disk; yields how many were begun."""
    begun = [0]

    def counted(act: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            begun[0] += 1
            if begun[0] == at:
                raise Killed
            return act(*args, **kwargs)

        return wrapped

    real_rmtree = shutil.rmtree

    def half_deleted(path: Path, ignore_errors: bool = False) -> None:
        """Deleting is no single step: it may end after the first file."""
        begun[0] += 1
        if begun[0] == at:
            for file in sorted(Path(path).glob("*"))[:1]:
                os.unlink(file)
            raise Killed
        real_rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        patch.setattr(Path, "write_text", counted(Path.write_text))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(weights.shutil, "rmtree", half_deleted)
        yield begun[0]


def test_a_writer_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before, or in the midst of, each change to the disk; then read, then written again and killed again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    outcomes = []
    for at in range(1, 40):
        folder = tmp_path / str(at) / "folder"
        commit(folder, "old")
        finished = False
        for _ in deaths(monkeypatch, at):
            try:
                commit(folder, "new")
                finished = True
            except Killed:
                pass
        assert content(folder) in ("old", "new")
        outcomes.append(content(folder))
        for again in range(1, 16):  # a second accident on top of the first
            second = Path(shutil.copytree(tmp_path / str(at), tmp_path / f"{at}.{again}")) / "folder"
            for _ in deaths(monkeypatch, again):
                try:
                    commit(second, "newer")
                except Killed:
                    pass
            assert content(second) in (outcomes[-1], "newer")
            commit(second, "last")
            assert content(second) == "last" and [path.name for path in second.parent.iterdir()] == ["folder"]
        if finished:
            break
    assert finished and outcomes[0] == "old" and outcomes[-1] == "new" and outcomes == sorted(outcomes, reverse=True)


def test_all_is_on_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this order a power cut could leave a folder whose files are empty."""
    events = []

    def flushed(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())

    rename = Path.rename

    def renamed(path: Path, target: Path) -> None:
        events.append(f"{path.name} -> {target.name}")
        rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    commit(tmp_path / "folder", "value")
    staged = {"folder.new", *(f"folder.new/{name}" for name in ("value", "more", MANIFEST))}
    assert set(events[:4]) == staged and events[4:] == ["folder.new -> folder", "."]


def test_a_first_write_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 12):
        folder = tmp_path / str(at) / "folder"
        for _ in deaths(monkeypatch, at):
            try:
                commit(folder, "new")
            except Killed:
                pass
        if folder.exists():
            assert content(folder) == "new"
        else:
            with pytest.raises(FileNotFoundError, match="does not exist"):
                check_folder(folder)
        commit(folder, "again")
        assert content(folder) == "again"


def test_readers_beside_a_writer_see_whole_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    commit(folder, "0")
    stop, problems, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            try:
                place = check_folder(folder, "value")
            except (ValueError, OSError) as error:
                problems.append(error)
                return
            seen.add(place.name)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(60):
        commit(folder, str(number))
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems and "folder" in seen


def test_a_model_saved_twice_is_not_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader's two looks may both come to a file too late, at two folders of the same content."""
    folder, again = tmp_path / "folder", iter([True, False])
    commit(folder, "0")

    def late(path: Path) -> str:
        monkeypatch.setattr(weights, "sha256", sha256)
        commit(folder, "1")
        found = sha256(path)
        if next(again):
            commit(folder, "0")
            monkeypatch.setattr(weights, "sha256", late)
        return found

    monkeypatch.setattr(weights, "sha256", late)
    assert content(folder) == "1"


def test_a_folder_of_someone_else_is_not_replaced(lively: Blip3o, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").write_text("dear to me")
    with pytest.raises(FileExistsError, match=r"pictures exists and has no manifest\.json"):
        save_pretrained(lively, Processor(), tmp_path / "pictures")
    assert (tmp_path / "pictures" / "holiday.png").read_text() == "dear to me"
    staged = staging(tmp_path / "new")
    (tmp_path / "new").write_text("a file")
    with pytest.raises(FileExistsError, match="new exists"):
        commit_folder(staged, tmp_path / "new")


def test_a_full_disk_is_an_error_and_the_old_model_stays(lively: Blip3o, folder: Path) -> None:
    before = {path.name: sha256(path) for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors|File too large"):
            save_pretrained(lively, Processor(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: sha256(path) for path in folder.iterdir()} == before
    from_pretrained(folder)
