"""Tar shards: whatever is wrong is named and moves nothing else; the order is a function of seed and position alone."""

import io
import json
import os
import random
import struct
import tarfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip3o import cli
from blip3o.data import scenes, shard_files, shard_index, shards, tar
from blip3o.data.loading import FaultySample, Loader, TooManyFaults
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.data.shard_index import JSON, PICTURE, TEXT, IndexRebuilt
from blip3o.data.shards import Sample, ShardChanged, Shards, Wrong
from blip3o.data.tar import BLOCK, Fault

COUNT, PER_SHARD = 240, 100


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    write_shards(folder, scene_samples(5, COUNT), PER_SHARD)
    return folder


def key_of(sample: Sample) -> str:
    return sample.key


def keys(
    sources: list[Shards], n: int, position: int = 0, rank: int = 0, world: int = 1, threads: int = 0, **options: object
) -> list[str]:
    """Of the next n samples of one process of `world`, from a position on."""
    with Loader(sources, seed=3, threads=threads, prepare=key_of, **options) as loader:  # type: ignore[arg-type]
        return loader.samples(range(position + rank, position + rank + n * world, world))


# --- what is written is what is read ----------------------------------------------------------------------------------


def test_scenes_come_back(clean: Path) -> None:
    source = Shards(clean)
    assert len(source) == COUNT and len(source.indices) == 3 and not list(source.faults)
    index = torch.arange(COUNT)
    pictures = scenes.render(scenes.sample(5, index)).mul(255).round().byte()
    for i in (0, 99, 100, 239):
        sample = source.read(i)
        assert isinstance(sample, Sample) and sample.picture is not None and sample.json is not None
        pixels = torch.frombuffer(bytearray(sample.picture.tobytes()), dtype=torch.uint8).view(32, 32, 3)
        assert torch.equal(pixels.permute(2, 0, 1), pictures[i])
        assert sample.key == f"{i:08}" and sample.text
        assert all(thing["shape"] in scenes.SHAPES for thing in sample.json["objects"])
    with pytest.raises(IndexError, match=r"0\.\.239"):
        source.read(COUNT)


@pytest.mark.parametrize("picture", ["jpg", "webp"])
def test_other_picture_formats(tmp_path: Path, picture: str) -> None:
    write_shards(tmp_path, scene_samples(5, 3, picture), 2)
    assert not list(shard_files.verify(Shards(tmp_path)))


def test_writing_refuses(tmp_path: Path, clean: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another"):
        write_shards(clean, scene_samples(5, 1), 1)
    for key in ("a.b", "/a", "", "a/", "a\nb"):
        with pytest.raises(ValueError, match="keys must be"):
            write_shards(tmp_path, [(key, {"txt": b"a"})], 1)
    with pytest.raises(ValueError, match="each once"):
        write_shards(tmp_path, [("a", {"txt": b"a"})] * 2, 2)
    with pytest.raises(ValueError, match="pkl"):
        write_shards(tmp_path, [("a", {"pkl": b"a"})], 1)
    with pytest.raises(ValueError, match="at least one"):
        write_shards(tmp_path, [], 1)
    assert not list(tmp_path.iterdir())  # nothing half written


# --- order ------------------------------------------------------------------------------------------------------------


def test_order_is_the_same_for_any_processes_and_any_cut(clean: Path) -> None:
    sources = [Shards(clean / "00000.tar", clean / "00001.tar"), Shards(clean / "00002.tar")]
    whole = keys(sources, 300, weights=[3, 1])
    assert len(set(whole)) > 200
    for world in (1, 2, 4, 8):
        shares = [keys(sources, 128 // world, weights=[3, 1], rank=rank, world=world) for rank in range(world)]
        assert [shares[p % world][p // world] for p in range(128)] == whole[:128]
    for cut in range(200):  # cut anywhere, resumed on another number of processes
        world = (1, 2, 4, 8)[cut % 4]
        for rank in {0, world - 1}:
            share = keys(sources, 2, weights=[3, 1], position=cut, rank=rank, world=world)
            assert share == whole[cut + rank :: world][:2]


def test_a_sample_is_a_function_of_its_position(clean: Path) -> None:
    source = Shards(clean)
    whole = keys([source], 300)
    with Loader([source], seed=3, threads=3, prepare=key_of) as loader:
        assert loader.samples(range(50, 90)) == whole[50:90]
        assert loader.samples([7, 299, 7]) == [whole[7], whole[299], whole[7]]
    assert keys([source], 100, rank=1, world=2, threads=3) == keys([source], 200)[1::2]
    assert sorted(keys([source], COUNT)) == [f"{i:08}" for i in range(COUNT)]  # an epoch is each once


def test_threads_decode_at_once(clean: Path) -> None:
    def slow(sample: Sample) -> str:
        time.sleep(0.01)
        return sample.key

    seconds = {}
    for threads in (0, 8):
        with Loader([Shards(clean)], seed=3, threads=threads, prepare=slow) as loader:
            began = time.perf_counter()
            loader.samples(range(32))
            seconds[threads] = time.perf_counter() - began
    assert seconds[8] < 0.6 * seconds[0], seconds


def test_errors_of_reading_arrive_in_order(clean: Path) -> None:

    def failing(sample: Sample) -> str:
        if sample.key == bad:
            raise RuntimeError("no")
        return sample.key

    order = keys([Shards(clean)], 10)
    bad = order[6]
    with Loader([Shards(clean)], seed=3, prepare=failing) as loader:
        seen = loader.samples(range(6))
        with pytest.raises(RuntimeError, match="no"):
            loader.samples(range(6, 10))
    assert seen == order[:6]


def test_what_cannot_be_prepared_is_a_fault(clean: Path) -> None:
    def short(sample: Sample) -> str:
        if sample.key in bad:
            raise Wrong("text", "too long")
        return sample.key

    order = keys([Shards(clean)], 2 * COUNT)
    bad = set(order[6:9])
    told: list[Fault] = []
    with Loader([Shards(clean)], seed=3, prepare=short, max_faults=0.1, report=told.append) as loader:
        assert loader.samples(range(COUNT)) == order[:6] + [order[9]] * 3 + order[9:COUNT]
    assert {(fault.kind, fault.name, fault.reason) for fault in told} == {("text", key, "too long") for key in bad}


# --- faults -----------------------------------------------------------------------------------------------------------


def sealed(block: bytearray) -> bytes:
    """A header with its checksum made right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def edit(shard: Path, at: int, change: Callable[[bytearray], object]) -> None:
    data = bytearray(shard.read_bytes())
    block = data[at : at + BLOCK]
    change(block)
    data[at : at + BLOCK] = sealed(block)
    shard.write_bytes(data)


def overwrite(shard: Path, at: int, new: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(new)


def rename(shard: Path, at: int, name: str) -> None:
    def change(block: bytearray) -> None:
        block[:100] = name.encode().ljust(100, b"\0")

    edit(shard, at, change)


class Sick:
    """One sample of a shard, and ways to make it ill."""

    def __init__(self, shard: Path, row: int) -> None:
        self.shard, index = shard, shard_index.make_index(shard)
        self.key, self.first_key = index.key(row), index.key(0)
        place = index.rows[row]["part"]
        self.picture, self.text, self.json = (int(place[part][0]) for part in (PICTURE, TEXT, JSON))
        self.size = int(place[PICTURE][1])

    def noise(self) -> None:
        overwrite(self.shard, self.picture, random.Random(0).randbytes(self.size))

    def half(self) -> None:
        overwrite(self.shard, self.picture + self.size // 2, bytes(self.size - self.size // 2))

    def bomb(self, width: int = 60_000, height: int = 60_000) -> None:  # above Pillow's limit, too
        start = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
        overwrite(self.shard, self.picture + 12, start + struct.pack(">I", zlib.crc32(start)))

    def large(self) -> None:
        self.bomb(8001, 8000)

    def pixels_of_another_format(self) -> None:  # a BMP under the name of a PNG
        overwrite(self.shard, self.picture, b"BM" + bytes(self.size - 2))

    def bad_json(self) -> None:
        overwrite(self.shard, self.json, b"[")

    def latin_text(self) -> None:
        overwrite(self.shard, self.text, b"\xe9")

    def link(self) -> None:
        def change(block: bytearray) -> None:
            block[156:157] = tarfile.SYMTYPE
            block[157:257] = b"/etc/passwd".ljust(100, b"\0")

        edit(self.shard, self.picture - BLOCK, change)

    def hard_link(self) -> None:
        def change(block: bytearray) -> None:
            block[156:157] = tarfile.LNKTYPE
            block[157:257] = f"{self.first_key}.png".encode().ljust(100, b"\0")

        edit(self.shard, self.picture - BLOCK, change)

    def pipe(self) -> None:
        def change(block: bytearray) -> None:
            block[156:157] = tarfile.FIFOTYPE

        edit(self.shard, self.picture - BLOCK, change)

    def upward(self) -> None:
        rename(self.shard, self.picture - BLOCK, f"../{self.key}.png")
        rename(self.shard, self.text - BLOCK, f"../{self.key}.txt")
        rename(self.shard, self.json - BLOCK, f"../{self.key}.json")

    def absolute(self) -> None:
        rename(self.shard, self.picture - BLOCK, f"/tmp/{self.key}.png")
        rename(self.shard, self.text - BLOCK, f"/tmp/{self.key}.txt")
        rename(self.shard, self.json - BLOCK, f"/tmp/{self.key}.json")

    def repeated(self) -> None:
        rename(self.shard, self.picture - BLOCK, f"{self.first_key}.png")
        rename(self.shard, self.text - BLOCK, f"{self.first_key}.txt")
        rename(self.shard, self.json - BLOCK, f"{self.first_key}.json")

    def pickle(self) -> None:
        rename(self.shard, self.json - BLOCK, f"{self.key}.pkl")

    def damaged_header(self) -> None:
        overwrite(self.shard, self.picture - BLOCK + 30, b"\xff")

    def zeroed_header(self) -> None:
        overwrite(self.shard, self.text - BLOCK, bytes(BLOCK))

    def endless(self) -> None:
        def change(block: bytearray) -> None:
            block[124:136] = b"77777777777\0"

        edit(self.shard, self.text - BLOCK, change)

    def without_text(self) -> None:
        rename(self.shard, self.text - BLOCK, f"{self.key}.cls")


KINDS = {
    Sick.noise: "picture", Sick.half: "picture", Sick.bomb: "pixels", Sick.large: "pixels",
    Sick.pixels_of_another_format: "picture", Sick.bad_json: "json", Sick.latin_text: "text",
    Sick.link: "link", Sick.hard_link: "link", Sick.pipe: "special",
    Sick.upward: "name", Sick.absolute: "name", Sick.repeated: "repeated", Sick.pickle: "pickle",
    Sick.damaged_header: "missing", Sick.zeroed_header: "missing", Sick.endless: "truncated",
    Sick.without_text: "missing",
}  # fmt: skip


def infect(clean: Path, folder: Path) -> dict[int, str]:
    """A copy of the shards in which one sample has each illness (8 % of all): their numbers and the faults' kinds."""
    folder.mkdir(parents=True)
    for shard in sorted(clean.glob("*.tar")):
        (folder / shard.name).write_bytes(shard.read_bytes())
    ill = {}
    for k, (make_ill, kind) in enumerate(KINDS.items()):
        i = 7 + 13 * k
        make_ill(Sick(folder / f"{i // PER_SHARD:05}.tar", i % PER_SHARD))
        ill[i] = kind
    # The last picture of the second shard ends where the shard is cut; its text and JSON are lost with the end.
    last = folder / "00001.tar"
    sick = Sick(last, PER_SHARD - 1)
    os.truncate(last, sick.picture + sick.size // 2)
    return ill | {2 * PER_SHARD - 1: "truncated"}


def test_every_fault_is_named_and_moves_nothing(clean: Path, tmp_path: Path) -> None:
    ill = infect(clean, tmp_path / "ill")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source, healthy = Shards(tmp_path / "ill"), Shards(clean)
    assert len(source) == len(healthy) == COUNT
    for i in range(COUNT):
        found = source.read(i)
        if i in ill:
            assert isinstance(found, Fault) and found.kind == ill[i], (i, found)
            assert str(found).startswith(f"{tmp_path}/ill/{i // PER_SHARD:05}.tar at byte {found.offset}")
            assert healthy.locate(i)[0].key(i % PER_SHARD) in found.name or found.kind == "repeated"
            start = int(healthy.indices[i // PER_SHARD].rows[i % PER_SHARD]["header"])
            assert start <= found.offset <= start + 8 * BLOCK
        else:
            assert isinstance(found, Sample) and found.key == healthy.read(i).key  # type: ignore[union-attr]
    between = Counter(fault.kind for fault in source.faults if fault.kind == "header")
    assert between["header"] == 5  # two headers, and the data that links and the pipe leave behind

    order, good = keys([healthy], 3 * COUNT), {f"{i:08}" for i in range(COUNT) if i not in ill}
    told: list[Fault] = []
    expected = [next(key for key in order[p:] if key in good) for p in range(2 * COUNT)]
    assert keys([source], 2 * COUNT, max_faults=0.1, report=told.append) == expected
    assert {fault.kind for fault in told} == {*ill.values(), "header"}
    assert len(told) == len({(fault.shard, fault.offset, fault.kind) for fault in told})
    shares = [keys([source], COUNT // 2, max_faults=0.2, report=told.append, rank=r, world=4) for r in range(4)]
    assert [shares[p % 4][p // 4] for p in range(2 * COUNT)] == expected

    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {f"0000{k}.tar.index" for k in range(3)}


def test_reading_stops_above_the_rate(clean: Path, tmp_path: Path) -> None:
    infect(clean, tmp_path / "ill")
    with pytest.raises(TooManyFaults, match=r"of 240 samples of .*ill are faulty by their headers"):
        Loader([Shards(tmp_path / "ill")], seed=3, prepare=key_of, max_faults=0.01, report=print)
    for i in range(12):
        folder = tmp_path / "noise"
        if not i:
            folder.mkdir()
            for shard in clean.glob("*.tar"):
                (folder / shard.name).write_bytes(shard.read_bytes())
        Sick(folder / "00000.tar", 3 * i).noise()
    told: list[Fault] = []
    with Loader([Shards(folder)], seed=3, max_faults=0.02, report=told.append, prepare=key_of) as loader:
        with pytest.raises(
            TooManyFaults, match=r"at most 4 are borne \(max_faults 0.02\); .* so far: picture 5; the last one: .*byte"
        ):
            loader.samples(range(COUNT))
        assert len(told) == 5 and loader.faults == {"picture": 5}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        keys([Shards(folder)], 3 * COUNT, max_faults=0.1)
    assert [warning.category for warning in seen] == [FaultySample] * 12  # once each, not once an epoch


def build(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"a", **records: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.pax_headers = records
    return info, data


def kinds(path: Path, needs: tuple[str, ...] = ("text",)) -> list[str]:
    return [fault.kind for fault in shard_files.verify(Shards(path, needs=needs))]


def test_malicious_tars(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    cases: list[tuple[list[tuple[tarfile.TarInfo, bytes]], list[str]]] = [
        ([member("a.txt"), member("b.txt"), member("dir/ä/c.TXT"), member("x" * 300 + ".txt")], []),
        ([member("a.txt"), member("a.txt")], ["repeated"]),
        ([member("a.txt"), member("b.txt"), member("a.json", b"{}")], ["repeated"]),
        ([member("a.txt", path="../../evil.txt")], ["name"]),
        ([member("a.txt", path="/evil.txt")], ["name"]),
        ([member("a/../../b.txt")], ["name"]),
        ([member("..\\b.txt")], ["name"]),
        ([member("a\x1b[2J.txt")], ["name"]),
        ([member("y" * 2000 + ".txt")], ["name"]),
        ([member("z" * 70_000 + ".txt")], ["header"]),
        ([member("a.txt", **{"GNU.sparse.major": "1"})], ["header"]),
        ([member("a.pyd"), member("b.pt"), member("c.pickle.gz")], ["pickle"] * 3),
        ([member("a.txt"), member("a.pkl")], ["pickle"]),
        ([member("a.txt"), member("README.md"), member("a.cls")], []),
        ([member("a.txt", b" \n")], ["text"]),
        ([member("a.txt", b"a" * (2 << 20))], ["size"]),
        ([member("a.txt"), member("a.json", b"[" * 100_000)], ["json"]),
        ([member("a.txt"), member("a.json", b'{"a": NaN}')], ["json"]),
        ([member("a.txt"), member("a.json", b"1" * 10_000)], ["json"]),
        ([member("a.txt"), member("a.json", b"[]")], ["json"]),
        ([member("a.txt"), member("a.jpg", b"\x80\x04.")], ["picture"]),
    ]
    for k, (members, expected) in enumerate(cases):
        path = build(tmp_path / f"{k}.tar", *members)
        assert kinds(path) == expected, (k, list(shard_files.verify(Shards(path, needs=("text",)))))
    assert Shards(tmp_path / "13.tar", needs=()).indices[0].unlisted == {"md": 1, "cls": 1}


def test_cut_and_joined_tars(tmp_path: Path) -> None:
    whole = build(tmp_path / "a.tar", member("a.txt"), member("b.txt")).read_bytes()
    cases = {
        4 * BLOCK + BLOCK: ["truncated"],  # one of the two empty blocks
        4 * BLOCK: ["truncated"],
        3 * BLOCK + 100: ["truncated"],  # in the data's padding
        3 * BLOCK: ["truncated"],
        2 * BLOCK + 100: ["truncated"],
        0: ["truncated"],
    }
    for size, expected in cases.items():
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        assert [fault.kind for fault in shard_index.make_index(path).faults] == expected, size
    (tmp_path / "two.tar").write_bytes(whole + build(tmp_path / "c.tar", member("c.txt")).read_bytes())
    assert len(Shards(tmp_path / "two.tar", needs=())) == 3 and kinds(tmp_path / "two.tar") == ["header"]
    (tmp_path / "tail.tar").write_bytes(whole + b"tail")
    assert kinds(tmp_path / "tail.tar") == ["header"]
    (tmp_path / "noise.tar").write_bytes(random.Random(1).randbytes(100_000))
    assert [fault.kind for fault in shard_index.make_index(tmp_path / "noise.tar").faults] == ["header"]


def test_random_damage_is_survived(clean: Path, tmp_path: Path) -> None:
    """Whatever the bytes are: samples or faults, no other error; and the rest of the shard is read."""
    whole = (clean / "00002.tar").read_bytes()
    path = tmp_path / "a.tar"
    for seed in range(60):
        chance = random.Random(seed)
        data = bytearray(whole)
        for _ in range(chance.choice((1, 10, 100))):
            at = chance.randrange(len(data) - 600)
            length = chance.choice((1, 8, BLOCK))
            data[at : at + length] = chance.choice((chance.randbytes(length), bytes(length)))
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IndexRebuilt)
            source = Shards(path)
        for i in range(0, len(source), 5):
            assert isinstance(source.read(i), Sample | Fault)
        source.close()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Neither a header of a gigabyte, nor a member of one, nor a gap of 100 MB is ever read into memory."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    text, big = tarfile.TarInfo("a.txt"), tarfile.TarInfo("b.txt")
    text.size, big.size = 1, 1 << 30
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.seek(1 << 30, 1)
        file.write(text.tobuf() + b"a".ljust(BLOCK, b"\0") + b"\1" * BLOCK)
        file.seek(100 << 20, 1)
        file.write(big.tobuf())
        file.seek(1 << 30, 1)
        file.write(bytes(2 * BLOCK))

    largest = 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:  # type: ignore[override]
            nonlocal largest
            largest = max(largest, size)
            return super().read(size)

    with Counting(path) as counting:
        found = list(tar.walk(counting, path.stat().st_size))  # type: ignore[arg-type]
    assert largest <= tar.CHUNK
    assert [(m.name, m.fault and m.fault[0]) for m in found] == [("a.txt", "header"), ("", "header"), ("b.txt", None)]
    result = Shards(path).read(1)
    assert isinstance(result, Fault)


def test_reading_does_not_grow(clean: Path, tmp_path: Path) -> None:
    """8 % of the samples faulty, epoch after epoch."""
    infect(clean, tmp_path / "ill")
    with Loader([Shards(tmp_path / "ill")], seed=3, prepare=key_of, max_faults=0.2, report=lambda _: None) as loader:

        def resident_after(epochs: range) -> int:
            for epoch in epochs:
                loader.samples(range(epoch * COUNT, (epoch + 1) * COUNT))
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        before = resident_after(range(4))
        assert resident_after(range(4, 16)) - before < 1 << 20


# --- the index --------------------------------------------------------------------------------------------------------


def test_index_is_made_once_and_anew_when_the_shard_changed(clean: Path, tmp_path: Path) -> None:
    shard, cache = tmp_path / "a.tar", tmp_path / "cache"
    shard.write_bytes((clean / "00000.tar").read_bytes())
    first = Shards(shard, cache=cache)
    assert first.indices[0].made
    assert not (tmp_path / "a.tar.index").exists() and len(list(cache.iterdir())) == 1
    again = Shards(shard, cache=cache)
    assert not again.indices[0].made and again.sum == first.sum
    assert keys([again], 20) == keys([first], 20)

    shard.write_bytes((clean / "00002.tar").read_bytes())
    with pytest.warns(IndexRebuilt, match="the shard has changed"):
        changed = Shards(shard, cache=cache)
    assert len(changed) == COUNT - 2 * PER_SHARD and changed.sum != first.sum
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ShardChanged, match="has changed since"):  # opened before, not read yet
        changed.read(0)
    with pytest.warns(IndexRebuilt):
        assert Shards(shard, cache=cache).sum == changed.sum


def test_a_damaged_index_is_never_used(clean: Path, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes((clean / "00002.tar").read_bytes())
    right = Shards(shard)
    place = shard_index.index_path(shard)
    whole = place.read_bytes()
    assert b"pickle" not in whole
    chance = random.Random(0)
    for k in range(100):
        data = bytearray(whole)
        at = chance.randrange(len(data)) if k % 2 else chance.randrange(300)
        data[at] ^= 1 << chance.randrange(8)
        place.write_bytes(data)
        with pytest.warns(IndexRebuilt):
            found = Shards(shard)
        assert found.sum == right.sum and place.read_bytes() == whole
    for data in (b"", whole[:-1], whole + b"a", whole[:40]):
        place.write_bytes(data)
        with pytest.warns(IndexRebuilt):
            assert Shards(shard).sum == right.sum


def test_places(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*.tar"):
        Shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        Shards(tmp_path / "absent.tar")
    with pytest.raises(ValueError, match="twice"):
        Shards(clean, clean / "00000.tar")
    with pytest.raises(ValueError, match="at least one"):
        Shards()
    with pytest.raises(ValueError, match="needs must be"):
        Shards(clean, needs=("sound",))


def test_files_are_closed(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(shards, "OPEN", 1)
    with Shards(clean) as source:
        for i in range(0, COUNT, 20):
            assert isinstance(source.read(i), Sample)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        assert isinstance(leaving.code, int)
        return leaving.code


def test_command(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("shards", "write", out, "--samples", 30, "--per-shard", 20, "--seed", 5, "--side", 48, "--turns", 2) == 0
    assert "30 samples in 2 shards" in capsys.readouterr().out
    assert run("shards", "verify", out) == 0
    assert "30 samples in 2 shards, 0 faults" in capsys.readouterr().out
    assert run("shards", "summarise", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 30 and found["width"] == [48, 48, 48] and found["pictures"] == {"PNG": 30}
    assert found["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    low, middle, high = found["caption words"]
    assert 1 < low <= middle <= high < 40
    sample = Shards(out).read(0)
    assert isinstance(sample, Sample) and sample.json is not None and len(sample.json["conversations"]) == 4

    Sick(out / "00001.tar", 3).noise()
    assert run("shards", "verify", out, "--cache", tmp_path / "cache") == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[1].endswith("1 faults")
    assert printed[0].startswith(f"{out}/00001.tar at byte ") and "'00000023' picture: " in printed[0]
    for options in (("--captions", "long"), ("--captions", "long", "--needs", "text"), ("--conversations",)):
        assert run("shards", "verify", out / "00000.tar", *options) == 0
    capsys.readouterr()
    assert (
        run("shards", "verify", out / "00000.tar", "--captions", "middling", "--conversations", "--needs", "text") == 1
    )
    assert capsys.readouterr().out.count("missing: no caption 'middling'") == 20
    write_shards(tmp_path / "dumb", [("a", {"json": b"{}"}), ("b", {"txt": b"b"})], 2)
    assert run("shards", "verify", tmp_path / "dumb", "--conversations") == 1
    assert [line.split(": ")[-2].split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [
        "conversation",
        "missing",
    ]
    assert run("shards", "verify", tmp_path / "absent") == 2
    assert "absent" in capsys.readouterr().err
    assert run("shards", "write", out) == 2
    assert "choose another folder" in capsys.readouterr().err
