"""Pictures in, rows with vectors out: decoded ahead in threads, encoded in batches, bad ones set aside."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Pair
from interlace.errors import UserError
from interlace.search.rows import Row, Skip, bytes_to_keep, jpeg

SIZE_HINT = 256  # pictures are decoded with a shortest side of at least twice this: enough for encoders up to 512 px


class Encoder(Protocol):
    """What search needs of a run; `interlace.run.Run` is one."""

    folder: Path
    fingerprint: str

    @property
    def dim(self) -> int: ...
    @property
    def can_match(self) -> bool: ...
    @property
    def match_weight(self) -> float: ...  # of the match logit beside the cosine; 0: matching does not help this run
    @property
    def picture_size(self) -> int: ...  # side in pixels of the pictures the model sees
    def encode_texts(self, texts: list[str]) -> np.ndarray: ...  # (N, D) float32, unit length
    def encode_pictures(self, pictures: list[Image.Image]) -> np.ndarray: ...  # (N, D) float32, unit length
    def match(self, text: str, pictures: list[Image.Image]) -> np.ndarray: ...  # (N,) probabilities


Decoded = tuple[Image.Image, bytes | None, bytes | None]  # pixels, thumbnail, bytes to keep


def threads() -> int:
    return min(8, os.cpu_count() or 1)


def skip_of(pair: Pair, reason: str) -> Skip:
    return Skip(pair.id, str(pair.picture), reason)


def embed(
    run: Encoder, pairs: Iterable[tuple[Pair, tuple[int, int]]], batch: int, thumbnail: int
) -> Iterator[tuple[list[Row], list[Skip]]]:
    """One (rows, skipped) per batch, in order. At most three batches of decoded pictures are in memory.

    A picture that cannot be decoded, or that the encoder refuses on its own, is skipped. An encoder that refuses every
    picture of a batch is not a matter of bad pictures, and its error is raised.
    """

    def decode(pair: Pair) -> Decoded | Skip:
        try:
            image = open_picture(pair.picture, size_hint=SIZE_HINT)
            small = jpeg(image, thumbnail) if thumbnail else None
            return image, small, bytes_to_keep(pair.picture, image)
        except BadPicture as error:
            return skip_of(pair, error.reason)
        except OSError as error:
            return skip_of(pair, error.strerror or str(error))

    waiting: deque[tuple[Pair, tuple[int, int], Future[Decoded | Skip]]] = deque()
    source = iter(pairs)
    with ThreadPoolExecutor(threads(), thread_name_prefix="decode") as pool:
        try:
            while True:
                for pair, prints in islice(source, max(0, 2 * batch - len(waiting))):
                    waiting.append((pair, prints, pool.submit(decode, pair)))
                if not waiting:
                    return
                yield _encode(run, [waiting.popleft() for _ in range(min(batch, len(waiting)))])
        finally:
            for *_, future in waiting:
                future.cancel()


def _encode(
    run: Encoder, jobs: list[tuple[Pair, tuple[int, int], Future[Decoded | Skip]]]
) -> tuple[list[Row], list[Skip]]:
    good: list[tuple[Pair, tuple[int, int], Decoded]] = []
    skipped: list[Skip] = []
    for pair, prints, future in jobs:
        result = future.result()
        if isinstance(result, Skip):
            skipped.append(result)
        else:
            good.append((pair, prints, result))
    if not good:
        return [], skipped
    rows = []
    for (pair, prints, (_, small, data)), vector in zip(good, _vectors(run, [image for _, _, (image, _, _) in good])):
        if isinstance(vector, str):
            skipped.append(skip_of(pair, vector))
        else:
            rows.append(Row(pair, prints, vector, small, data))
    return rows, skipped


def _vectors(run: Encoder, images: list[Image.Image]) -> list[np.ndarray | str]:
    """A unit vector per picture, or the reason why there is none."""
    try:
        encoded = list(np.asarray(run.encode_pictures(images), dtype=np.float32))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # one odd picture must not end a long run: find it by encoding one at a time
        encoded = [_alone(run, image) for image in images] if len(images) > 1 else []
        if all(isinstance(vector, str) for vector in encoded):
            raise error from None
    return [_unit(vector, run.dim) if isinstance(vector, np.ndarray) else vector for vector in encoded]


def _alone(run: Encoder, image: Image.Image) -> np.ndarray | str:
    try:
        return np.asarray(run.encode_pictures([image]), dtype=np.float32)[0]
    except (UserError, MemoryError):
        raise
    except Exception as error:
        return f"the encoder refused it ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"


def _unit(vector: np.ndarray, dim: int) -> np.ndarray | str:
    if vector.shape != (dim,):
        raise UserError(f"The run says its vectors have {dim} numbers, but its encoder gave {vector.shape[-1]}.")
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length < 1e-12:
        return "the encoder gave no finite vector"
    return vector / np.float32(length)
