"""Pictures with the texts that may belong to them -> what the captioner writes and what the filter says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from PIL import Image

from interlace.bootstrap.captions import sampled
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
    fused = model.fuse(half, image.rows(rows))
    match = model.heads["match"](fused.pooled_text, fused.pooled_image).float().softmax(-1)[:, 1].tolist()
    cosine: list[float | None] = [None] * len(some)
    if run.dim:
        vectors = model.alone(image, "image").float()[rows]
        cosine = (model.alone(half, "text").float() * vectors).sum(-1).tolist()
    for n, m, c in zip(some, match, cosine):
        out[n] = round(m, DIGITS), None if c is None else round(c, DIGITS)
    return out


class Judge:
    """Both models over a batch of rows: a line for each, as it is kept. Without a captioner nothing is written."""

    def __init__(self, captioner: Run | None, filter_: Run, source: Source, seed: int, top_p: float, max_length: int):
        self.captioner, self.filter, self.source = captioner, filter_, source
        self.seed, self.top_p, self.max_length = seed, top_p, max_length

    @property
    def side(self) -> int:
        """Pixels of the shortest side that the larger of the two models sees."""
        return max(run.picture_size for run in (self.captioner, self.filter) if run is not None)

    @torch.inference_mode()
    def lines(self, batch: list[tuple[int, Any]]) -> list[dict[str, Any]]:
        """Rows and their pictures -> {"row", "id", "web", "synthetic", "match_web", ...}, or {"row", "id", "bad"}."""
        good = [(row, picture) for row, picture in batch if not isinstance(picture, BadPicture)]
        pairs = {row: self.source.pair(row) for row, _ in batch}
        said: dict[int, dict[str, Any]] = {}
        if good:
            pictures = [picture for _, picture in good]
            seen = self.filter.half_image(pictures)
            synthetic = [""] * len(good)
            if self.captioner is not None:
                read = seen if self.captioner is self.filter else self.captioner.half_image(pictures)
                synthetic = sampled(self.captioner, read, [pairs[row].id for row, _ in good], self.seed, self.top_p,
                                    self.max_length)  # fmt: skip
            web = [pairs[row].caption for row, _ in good]
            places = list(range(len(good)))
            found = scores(self.filter, seen, [*web, *synthetic], [*places, *places])
            for n, (row, _) in enumerate(good):
                (a, b), (c, d) = found[n], found[len(good) + n]
                said[row] = {"web": web[n], "synthetic": synthetic[n], "match_web": a, "cosine_web": b,
                             "match_synthetic": c, "cosine_synthetic": d}  # fmt: skip
        return [{"row": row, "id": pairs[row].id, **(said.get(row) or {"bad": picture.reason})}
                for row, picture in batch]


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

