"""What the captioner writes about pictures, and what the filters say of old and new texts: a line for each row."""

from __future__ import annotations

from typing import Any

import torch

from interlace.bootstrap.captions import sampled
from interlace.bootstrap.folds import Filters
from interlace.bootstrap.score import scores
from interlace.data.pictures import BadPicture
from interlace.data.rows import Pair, Source
from interlace.run import Run


class Judge:
    """Captioner and filters over a batch of rows: a line for each, as it is kept. Without a captioner nothing is
    written."""

    def __init__(self, captioner: Run | None, filters: Filters, source: Source, seed: int, top_p: float,
                 max_length: int):  # fmt: skip
        self.captioner, self.filters, self.source = captioner, filters, source
        self.seed, self.top_p, self.max_length = seed, top_p, max_length

    @property
    def side(self) -> int:
        """Pixels of the shortest side that the larger of the two models sees."""
        return max(run.picture_size for run in (self.captioner, *self.filters.runs) if run is not None)

    @torch.inference_mode()
    def lines(self, batch: list[tuple[int, Any]]) -> list[dict[str, Any]]:
        """Rows and their pictures -> {"row", "id", "web", "synthetic", "match_web", ...}, or {"row", "id", "bad"}."""
        good = [(row, picture) for row, picture in batch if not isinstance(picture, BadPicture)]
        pairs = {row: self.source.pair(row) for row, _ in batch}
        said: dict[int, dict[str, Any]] = {}
        for filter_, places in self.filters.parted([row for row, _ in good]):
            said |= self._judged(filter_, [good[n] for n in places], pairs)
        return [{"row": row, "id": pairs[row].id, **(said.get(row) or {"bad": picture.reason})}
                for row, picture in batch]



    def _judged(self, filter_: Run, good: list[tuple[int, Any]], pairs: dict[int, Pair]) -> dict[int, dict[str, Any]]:
        """Row -> its texts, and what this filter says of them."""
        pictures = [picture for _, picture in good]
        seen, synthetic = filter_.half_image(pictures), [""] * len(good)
        if self.captioner is not None:
            read = seen if self.captioner is filter_ else self.captioner.half_image(pictures)
            synthetic = sampled(self.captioner, read, [pairs[row].id for row, _ in good], self.seed, self.top_p,
                                self.max_length)  # fmt: skip
        web = [pairs[row].caption for row, _ in good]
        places = list(range(len(good)))
        found = scores(filter_, seen, [*web, *synthetic], [*places, *places])
        said = {}
        for n, (row, _) in enumerate(good):
            (a, b), (c, d) = found[n], found[len(good) + n]
            said[row] = {"web": web[n], "synthetic": synthetic[n], "match_web": a, "cosine_web": b,
                         "match_synthetic": c, "cosine_synthetic": d}  # fmt: skip
        return said
