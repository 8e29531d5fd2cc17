"""Features of shards' pictures on disk: the tower's own, written once, and never used where they do not fit."""

import os
import random
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip3o.data.features import DamagedFeatures, Features, features_path
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault
from blip3o.model import Blip3o
from blip3o.processor import square
from blip3o.train import feature_cache
from blip3o.train.feature_cache import FeaturesRebuilt, cache_features, feature_key, tower_sum

COUNT = 30
BROKEN, BARE = 4, 7  # a sample whose picture is noise, and one without a picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of scenes; to be left alone."""
    place = tmp_path_factory.mktemp("shards")
    samples = list(scene_samples(5, COUNT))
    samples[BROKEN][1]["png"] = b"noise"
    del samples[BARE][1]["png"]
    write_shards(place, samples, 20)
    return place


def opened(folder: Path, model: Blip3o, cache: Path, dtype: str = "float32", **options: object) -> Shards:
    shards = Shards(folder, cache=cache, **options)  # type: ignore[arg-type]
    shards.features = cache_features(shards, model, cache, dtype)
    return shards


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.features"))


def seen(model: Blip3o, sample: Sample | Fault) -> Tensor:
    """Straight from the picture."""
    assert isinstance(sample, Sample) and sample.picture is not None
    with torch.inference_mode():
        picture = square(sample.picture, model.config.clip.image_size, "center")
        return model.pool(model.clip.vision(model.normalize(picture[None])))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_features_are_the_towers(folder: Path, lively: Blip3o, tmp_path: Path, dtype: str) -> None:
    shards, plain = opened(folder, lively, tmp_path, dtype), Shards(folder)
    assert len(files(tmp_path)) == 2
    bits = torch.finfo(getattr(torch, dtype)).eps
    for i in range(COUNT):
        found, decoded = shards.read(i), plain.read(i)
        if i in (BROKEN, BARE):
            assert isinstance(found, Fault) and found == decoded and found.kind == ("picture", "missing")[i == BARE]
            continue
        assert isinstance(found, Sample) and found.picture is None and found.features is not None
        assert (found.key, found.text) == (decoded.key, decoded.text)  # type: ignore[union-attr]
        assert found.features.dtype is getattr(torch, dtype)
        torch.testing.assert_close(found.features.float(), seen(lively, decoded), rtol=bits, atol=1e-5)
    bare = opened(folder, lively, tmp_path, dtype, needs=("json",)).read(BARE)
    assert isinstance(bare, Sample) and bare.features is None and bare.picture is None


def test_features_are_computed_once(
    folder: Path, lively: Blip3o, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that was killed in between goes on with the shards that are missing."""
    opened(folder, lively, tmp_path)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    made: list[int] = []
    rows = feature_cache._rows
    monkeypatch.setattr(
        feature_cache, "_rows", lambda shards, which, *rest: made.append(which) or rows(shards, which, *rest)
    )
    (tmp_path / ".lock").unlink()
    opened(folder, lively, tmp_path)
    assert not made
    assert not (tmp_path / ".lock").exists()  # nothing was to be made
    lost = files(tmp_path)[1]
    lost.rename(lost.with_name(lost.name + ".part"))  # what a kill leaves behind
    opened(folder, lively, tmp_path)
    assert made == [1] and {path: path.read_bytes() for path in files(tmp_path)} == before
    assert not list(tmp_path.glob("*.part"))


def test_other_weights_shards_and_sizes_have_other_files(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    key = feature_key(lively, 1000, "float32")
    index = Shards(folder).indices[0]
    weight = next(lively.clip.vision.parameters())
    keys = [key, replace(key, dtype="bfloat16"), feature_key(lively, 999, "float32")]
    was = tower_sum(lively)
    with torch.no_grad():
        before = weight.clone()
        weight.view(-1)[0] += 1
        keys.append(feature_key(lively, 1000, "float32"))
        weight.copy_(before)
    assert keys[-1].tower != was
    paths = [features_path(tmp_path, index, key) for key in keys]
    paths.append(features_path(tmp_path, Shards(folder).indices[1], key))
    assert len(set(paths)) == 5
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16"):
        feature_key(lively, 1000, "float16")


def test_a_file_of_others_is_not_used(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    was = opened(folder, lively, tmp_path).read(0).features  # type: ignore[union-attr]
    first, second = files(tmp_path)
    right = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.warns(FeaturesRebuilt, match="belongs to another shard"):
        again = opened(folder, lively, tmp_path)
    assert first.read_bytes() == right
    assert torch.equal(again.read(0).features, was)  # type: ignore[union-attr,arg-type]


def test_pictures_that_changed_are_seen_anew(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    """Same names, places and lengths, other pixels: the index cannot know."""
    place = tmp_path / "shards"
    shutil.copytree(folder, place)
    opened(place, lively, tmp_path / "cache")
    shard = place / "00000.tar"
    status, data = shard.stat(), bytearray(shard.read_bytes())
    start = int(Shards(place, cache=tmp_path / "cache").indices[0].rows[0]["part"][0][0])
    data[start + 60] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.warns(FeaturesRebuilt, match="'00000000' is another one now"):
        assert isinstance(opened(place, lively, tmp_path / "cache").read(0), Fault)


def test_every_damage_is_noticed(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    """When the file is opened, or when the row is read; but in the zeros of a faulty picture, which nobody reads."""
    shards = opened(folder, lively, tmp_path)
    path, index, key = files(tmp_path)[0], shards.indices[0], feature_key(lively, shards.max_pixels, "float32")
    whole = path.read_bytes()
    unread = range(BROKEN * key.row_bytes, (BROKEN + 1) * key.row_bytes)
    chance = random.Random(0)
    late = 0
    for k in range(300):
        data = bytearray(whole)
        at = chance.choice([place for place in (chance.randrange(len(data) - 64), 100) if place not in unread])
        if k % 4 == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif k % 4 == 1:
            del data[at:]
        elif k % 4 == 2:
            data[at : at + 64] = chance.randbytes(64)
        else:
            data += bytes(1 + at % 100)
        path.write_bytes(data)
        try:
            damaged = Features(path, index, key)
        except ValueError:
            continue
        late += 1
        with pytest.raises(DamagedFeatures, match="checksum is wrong; delete"):
            for row in range(len(index)):
                damaged.read(row)
    assert 20 < late < 200
    with pytest.raises(FileNotFoundError):
        Features(tmp_path / "absent", index, key)


def test_a_file_that_is_cut_while_it_is_read(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    """By whoever copies over it, say: an error, where a mapped file would kill the process."""
    shards = opened(folder, lively, tmp_path)
    key = feature_key(lively, shards.max_pixels, "float32")
    path = files(tmp_path)[0]
    features = Features(path, shards.indices[0], key)
    os.truncate(path, key.row_bytes + 1)
    features.read(0)
    with pytest.raises(DamagedFeatures, match="was cut: row 1 is missing"):
        features.read(1)


def test_processes_share_the_work(folder: Path, lively: Blip3o, tmp_path: Path) -> None:
    """What another one is making is left to it, and waited for at the end."""
    shards = Shards(folder, cache=tmp_path)
    path = features_path(tmp_path, shards.indices[0], feature_key(lively, shards.max_pixels, "float32"))
    told, tell = os.pipe()
    other = os.fork()
    if not other:  # which touches nothing but the lock
        with feature_cache._lock(path, wait=True):
            os.write(tell, b"1")
            time.sleep(0.3)
            os._exit(0)
    assert os.read(told, 1) == b"1"
    with feature_cache._lock(path, wait=False) as held:
        assert not held
    with feature_cache._lock(path.with_name("another"), wait=False) as held:
        assert held
    began = time.perf_counter()
    cache_features(shards, lively, tmp_path, "float32")
    assert time.perf_counter() - began > 0.1 and len(files(tmp_path)) == 2
    assert os.waitpid(other, 0) == (other, 0)
    os.close(told)
    os.close(tell)


def test_a_picture_of_one_row_is_no_bomb() -> None:
    from PIL import Image

    for size in ((100_000, 1), (1, 100_000), (3, 2), (64, 300)):
        assert square(Image.new("RGB", size, (255, 0, 0)), 32, "center").shape == (3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = Image.new("RGB", (40, 10), "white")
        left.paste((255, 0, 0), (15, 0, 25, 10))
        assert bool((square(left, 10, "center")[0] == 1).all())


def test_a_picture_too_large_to_be_read_is_not_read(
    lively: Blip3o, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "shards", scene_samples(5, 3), 3)
    monkeypatch.setattr("blip3o.data.shards.MAX_BYTES", (100, 1 << 20, 1 << 20))
    monkeypatch.setattr(feature_cache, "MAX_BYTES", (100, 1 << 20, 1 << 20))
    monkeypatch.setattr(Shards, "pread", lambda *_: pytest.fail("read"))
    shards = Shards(tmp_path / "shards")
    for _ in range(2):  # made, and opened
        found = cache_features(shards, lively, tmp_path, "float32")[0].read(1)
        assert isinstance(found, Fault) and found.kind == "size"
