"""Which words and cells are hidden together: MLIM's Modality Aware Masking and modality dropout.

Arici et al. 2021 (arXiv:2109.12178). Hiding most of one modality and nothing of the other makes the model read across;
hiding a little of both keeps it reading within. Words or cells, a slot is hidden by itself, with its mode's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interlace.errors import UserError


@dataclass(frozen=True)
class Mode:
    """Rates at which words and cells are hidden."""

    text: float
    image: float

    def __post_init__(self) -> None:
        if not (0 <= self.text <= 1 and 0 <= self.image <= 1):
            raise UserError(f"a rate of hiding lies between 0 and 1; got {self.text} and {self.image}.")


# heavy image, heavy text, light, each a third of the time. The light rates could not be verified in the paper
MODES = (Mode(text=0.0, image=0.8), Mode(text=0.8, image=0.0), Mode(text=0.15, image=0.15))


def hide_slots(may: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """may (L,) bool, True = may be hidden -> hidden (L,) bool. At least one where the rate is above 0 and one may: the
    slot that came nearest."""
    chance = rng.random(len(may))
    hidden = (chance < rate) & may
    if rate > 0 and may.any() and not hidden.any():
        hidden[np.where(may, chance, 2.0).argmin()] = True
    return hidden


def modality_aware(words: Tensor, cells: Tensor, rngs: Sequence[np.random.Generator], modes: Sequence[Mode] = MODES,
                   scope: str = "sample") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """words (B, T), cells (B, I) bool, True = may be hidden; one generator per row
    -> hidden words (B, T), hidden cells (B, I), index of each row's mode (B,).

    `scope`: "sample", a mode for each row; "batch", the first row's for all. A row's draws are its mode, its cells, its
    words, in this order: so how far the batch pads its texts changes nothing. Raises UserError for another scope.
    """
    if scope not in ("sample", "batch"):
        raise UserError(f"the scope of a masking mode is sample or batch; got {scope!r}.")
    drawn = [int(rng.integers(len(modes))) for rng in rngs]
    if scope == "batch":
        drawn = drawn[:1] * len(drawn)
    seen = [hide_slots(row, modes[mode].image, rng) for row, mode, rng in zip(_rows(cells), drawn, rngs)]
    read = [hide_slots(row, modes[mode].text, rng) for row, mode, rng in zip(_rows(words), drawn, rngs)]
    return _stack(read, words), _stack(seen, cells), torch.tensor(drawn, device=words.device)


def modality_dropout(words: Tensor, cells: Tensor, rngs: Sequence[np.random.Generator], image: float = 1 / 3,
                     text: float = 1 / 3) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Hides all that may be hidden of one modality, in fine-tuning, so that the model leans on neither: the cells of a
    row with chance `image`, else the words with chance `text`, else nothing. Shapes as in `modality_aware`. The chances
    could not be verified in the paper. Raises UserError when they make more than 1."""
    if image < 0 or text < 0 or image + text > 1:
        raise UserError(f"the chances of dropping the image or the text lie between 0 and 1, as does their sum; got "
                        f"{image} and {text}.")  # fmt: skip
    drawn = torch.tensor([rng.random() for rng in rngs], device=words.device).unsqueeze(1)  # (B, 1)
    return words.bool() & (drawn >= image) & (drawn < image + text), cells.bool() & (drawn < image)


def _rows(slots: Tensor) -> np.ndarray:
    return slots.bool().cpu().numpy()


def _stack(rows: list[np.ndarray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(rows)).to(like.device)
