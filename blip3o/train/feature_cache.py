"""The frozen CLIP tower's features of the pictures of shards: taken from their files, or computed and written there."""

import fcntl
import hashlib
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from blip3o.data.features import FeatureKey, Features, features_path, write_features
from blip3o.data.shard_index import PICTURE, Index
from blip3o.data.shards import MAX_BYTES, Shards
from blip3o.data.tar import Fault
from blip3o.model import Blip3o
from blip3o.processor import square

CHUNK_PIXELS = 1 << 22  # that the tower sees at a time
CHECKED = 4  # pictures of each shard whose bytes are compared with those that were seen


class FeaturesRebuilt(UserWarning):
    """Stored features that were there did not fit, or were damaged, and have been made anew."""


def tower_sum(model: Blip3o) -> str:
    """SHA-256 of the CLIP tower's weights, their names and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.clip.vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def feature_key(model: Blip3o, max_pixels: int, dtype: str) -> FeatureKey:
    """Of the raw pooled features, before they are standardised. Raises ValueError for an unknown dtype."""
    config = model.config
    transform = (
        f"at most {max_pixels} pixels; middle square, bicubic, {config.clip.image_size} pixels wide; CLIP's mean"
    )
    return FeatureKey(tower_sum(model), transform, (config.feature_grid**2, config.clip.width), dtype)


def cache_features(shards: Shards, model: Blip3o, folder: Path, dtype: str, threads: int = 2) -> list[Features]:
    """What the CLIP tower sees in the pictures of each shard, raw (not standardised), as it is stored in `folder`.

    In the dtype of the weights, without autocast. What is missing is computed first; what does not fit is replaced,
    with the warning FeaturesRebuilt. A start that was killed loses one shard at most. Processes that start together
    share the work.
    Raises ValueError for an unknown dtype, OSError of the disk.
    """
    key = feature_key(model, shards.max_pixels, dtype)
    paths = [features_path(folder, index, key) for index in shards.indices]
    found: dict[int, Features] = {}
    for which, path in enumerate(paths):  # what is there needs no lock, and no folder that can be written to
        with suppress(FileNotFoundError, ValueError):
            found[which] = _stored(path, shards, which, key)
    with tqdm(total=len(paths), initial=len(found), desc="features", unit="shard", delay=1.0, leave=False) as bar:
        for wait in (False, True):  # first those that no other process is making
            for which, path in enumerate(paths):
                if which in found:
                    continue
                with _lock(path, wait) as held:
                    if held:
                        found[which] = _stored_or_made(path, shards, which, model, key, threads)
                        bar.update()
    return [found[which] for which in range(len(paths))]


def _stored(path: Path, shards: Shards, which: int, key: FeatureKey) -> Features:
    """Raises FileNotFoundError; ValueError for a file that does not fit, or if some pictures of the shard are not those
    that were seen: an index knows no pixels."""
    index = shards.indices[which]
    features = Features(path, index, key)
    pictured = np.flatnonzero((index.rows["fault"] < 0) & (index.rows["part"][:, PICTURE, 0] >= 0)).tolist()
    for row in pictured[:: max(1, len(pictured) // CHECKED)]:
        if _picture_sum(shards, which, row) != features.picture_sums[row]:
            raise ValueError(f"the shard's picture {index.key(row)!r} is another one now")
    return features


def _stored_or_made(path: Path, shards: Shards, which: int, model: Blip3o, key: FeatureKey, threads: int) -> Features:
    try:
        return _stored(path, shards, which, key)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"{path} is made anew: {error}", FeaturesRebuilt, stacklevel=3)
    write_features(path, shards.indices[which], key, _rows(shards, which, model, threads))
    return Features(path, shards.indices[which], key)


def _rows(shards: Shards, which: int, model: Blip3o, threads: int) -> Iterator[tuple[Tensor | Fault | None, int]]:
    """Of each row of a shard: features, or what is wrong with its picture, or None; and the CRC-32 of its file."""
    index, side = shards.indices[which], model.config.clip.image_size
    size = max(1, CHUNK_PIXELS // side**2)

    def picture(row: int) -> tuple[Tensor | Fault | None, int]:
        if not _has_picture(index, row):
            return None, 0
        found = shards.part(which, row, PICTURE)
        pixels = found if isinstance(found, Fault) else square(found, side, "center")
        return pixels, _picture_sum(shards, which, row)

    chunks = [range(start, min(start + size, len(index))) for start in range(0, len(index), size)]
    weight = next(model.clip.vision.parameters())
    with ThreadPoolExecutor(max(1, threads)) as pool:
        following = pool.map(picture, chunks[0]) if chunks else iter(())
        for number in range(len(chunks)):
            found = list(following)
            if number + 1 < len(chunks):  # decoded while the tower looks at these
                following = pool.map(picture, chunks[number + 1])
            pictures = [pixels for pixels, _ in found if isinstance(pixels, Tensor)]
            seen: Iterator[Tensor] = iter(())
            if pictures:
                with torch.inference_mode():
                    seen = iter(model.pool(model.clip.vision(model.normalize(torch.stack(pictures).to(weight)))))
            for pixels, picture_sum in found:
                yield (next(seen) if isinstance(pixels, Tensor) else pixels), picture_sum


def _has_picture(index: Index, row: int) -> bool:
    return bool(index.rows[row]["fault"] < 0 <= index.rows[row]["part"][PICTURE][0])


def _picture_sum(shards: Shards, which: int, row: int) -> int:
    """CRC-32 of a picture's file; 0 of one that is too large to be read."""
    start, size = (int(x) for x in shards.indices[which].rows[row]["part"][PICTURE])
    return 0 if size > MAX_BYTES[PICTURE] else zlib.crc32(shards.pread(which, start, size))


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the right to make `path` among the processes that share its folder; False where another has it.

    One byte of one file stands for a path, so nothing is left behind for each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    byte = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "little")
    with (path.parent / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except BlockingIOError:
            yield False
        else:
            yield True
