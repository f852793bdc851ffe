"""Pictures with the texts that may belong to them -> what a filter says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from PIL import Image

from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Source
from interlace.model import Half
from interlace.run import Run
from interlace.search.embed import threads

Score = tuple[float | None, float | None]  # match probability, cosine; None: no text, or no contrast head
DIGITS = 6  # what is written is what is compared: a verdict can be checked by hand
NOTHING: Score = (None, None)


def batches(source: Source, rows: Sequence[int], size: int, side: int) -> Iterator[list[tuple[int, Any]]]:
    """(row, picture or BadPicture) of `size` rows at a time, decoded ahead in threads; of never more than three
    batches are pictures in memory."""

    def decode(row: int) -> tuple[int, Image.Image | BadPicture]:
        try:
            return row, open_picture(source.picture(row), size_hint=side)
        except BadPicture as bad:
            return row, bad
        except OSError as error:
            return row, BadPicture(f"cannot be read ({error.strerror or error})")

    waiting: deque[Future] = deque()
    todo = iter(rows)
    with ThreadPoolExecutor(threads(), thread_name_prefix="decode") as pool:
        try:
            while True:
                waiting.extend(pool.submit(decode, int(row)) for row in islice(todo, 2 * size - len(waiting)))
                if not waiting:
                    return
                yield [waiting.popleft().result() for _ in range(min(size, len(waiting)))]
        finally:
            for task in waiting:
                task.cancel()


@torch.inference_mode()
def scores(run: Run, image: Half, texts: Sequence[str], of: Sequence[int]) -> list[Score]:
    """Text n with picture of[n] of the image's half -> the probability that they match, and their cosine. A text
    without words has no score."""
    out: list[Score] = [NOTHING] * len(texts)
    some = [n for n, text in enumerate(texts) if text.strip()]
    if not some:
        return out
    model = run.model
    rows = torch.tensor([of[n] for n in some], device=image.states.device)
    half = model.half_text(*run._words([texts[n] for n in some]))
    cosine = None
    if run.dim:
        vectors = model.alone(image, "image").float()[rows]
        cosine = (model.alone(half, "text").float() * vectors).sum(-1)
    scale, offset = run.match_head_fit  # alone, as in BLIP: two scores that say two things can be told apart
    match = (scale * run.head_logits(half, image.rows(rows)) + offset).sigmoid().tolist()
    for n, m, c in zip(some, match, [None] * len(some) if cosine is None else cosine.tolist()):
        out[n] = round(m, DIGITS), None if c is None else round(c, DIGITS)
    return out


def score_pairs(run: Run, source: Source, texts: dict[int, list[str]],
                batch: int) -> Iterator[tuple[int, list[Score]]]:  # fmt: skip
    """Row -> texts; yields the scores of each row's texts with its picture. Rows whose picture cannot be read are left
    out."""
    for some in batches(source, list(texts), batch, run.picture_size):
        good = [(row, picture) for row, picture in some if not isinstance(picture, BadPicture)]
        if not good:
            continue
        with torch.inference_mode():
            image = run.half_image([picture for _, picture in good])
        asked = [(text, place) for place, (row, _) in enumerate(good) for text in texts[row]]
        found = iter(scores(run, image, [text for text, _ in asked], [place for _, place in asked]))
        for row, _ in good:
            yield row, [next(found) for _ in texts[row]]

