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
from interlace.model import VLModel
from interlace.objectives.base import Batch, Objective, Scored, Views, hides, systems_where
from interlace.objectives.mlm import MLM

SCOPES = ("sample", "batch")


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
    if scope not in SCOPES:
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


def check_hiding(name: str, model: VLModel) -> None:
    """Raises UserError when the image part has nothing to put in the place of a hidden cell."""
    if not (getattr(model.image, "hides", False) or hasattr(model.config.image, "features")):
        raise UserError(f"{name} hides parts of the picture, and the image part {model.config.image.name!r} has "
                        "nothing to put in their place: use blocks, regions, a grid, or `hide: true`."
                        f"{systems_where(hides)}")  # fmt: skip


class MAM(MLM):
    """Guess hidden words while words and cells are hidden together, by modality; with `recon` in the same pass, MLIM's
    pre-training.

    Columns: image, caption. Hides: of each row `heavy` of the cells, or `heavy` of the words, or `light` of both, each
    a third of the time; a hidden word is always [MASK]. Sees: everyone sees everyone. Head: mlm, at hidden words alone;
    0 where a row hides none. Logs: mlm, mlm_accuracy.

    `scope` "batch": one mode for all rows of a batch. `mismatched` False: a sentence that ITM swapped is not scored.
    It hides for the whole pass, so no other objective of the pass may (mlm, mrfr, ...).
    """

    name = "mam"
    hides_cells = True

    def __init__(self, heavy: float = 0.8, light: float = 0.15, heavy_image: float = 0.0, scope: str = "sample",
                 mismatched: bool = True):  # fmt: skip
        if not 0 <= heavy_image <= 1:
            raise UserError(f"mam.heavy_image is the share of the cells to hide, up to 1, or 0 for as many as "
                            f"mam.heavy; got {heavy_image}.")  # fmt: skip
        if not (0 < heavy < 1 and 0 < light < 1):
            raise UserError(f"mam.heavy and mam.light are shares to hide, above 0 and below 1; got {heavy} and "
                            f"{light}.")  # fmt: skip
        if scope not in SCOPES:
            raise UserError(f"mam.scope is sample or batch; got {scope!r}.")
        self.modes = (Mode(0.0, heavy_image or heavy), Mode(heavy, 0.0), Mode(light, light))
        self.scope, self.mismatched = scope, mismatched

    def check(self, model: VLModel) -> None:
        super().check(model)
        check_hiding("mam", model)

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        if "hidden" in part or "word_labels" in part:
            raise UserError("mam decides what is hidden of words and picture together: leave other objectives that "
                            "hide (mlm, mrfr, mrc, mdo) out of its pass.")  # fmt: skip
        ids = part["text_ids"]
        words, part["hidden"], _ = modality_aware(part["text_words"] >= 0, part["cells"], rngs, self.modes, self.scope)
        part["text_ids"] = ids.masked_fill(words, processor.mask_id)
        if not self.mismatched and "matched" in part:
            words = words & part["matched"].unsqueeze(1)
        part["word_labels"] = ids.masked_fill(~words, -100)


class ModalityDropout(Objective):
    """Hides one modality at times, in fine-tuning, so that what the pass learns leans on neither: all words but the
    special ones become [MASK], or all cells. It has no loss of its own; evaluation hides nothing.

    Columns: those of the other objectives of its pass, which must read the pass's shared forward (answers, itm with
    negatives=swap, ...). Hides: of a row its picture with chance `image`, or else its words with chance `text`. Sees:
    everyone sees everyone. Head: none. Logs: nothing.
    """

    name = "mdo"
    fused = True
    hides_cells = True

    def __init__(self, image: float = 1 / 3, text: float = 1 / 3):
        if image < 0 or text < 0 or image + text > 1:
            raise UserError(f"mdo.image and mdo.text are chances, and so is their sum; got {image} and {text}.")
        self.image, self.text = image, text

    def check(self, model: VLModel) -> None:
        super().check(model)
        check_hiding("mdo", model)

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor) -> None:
        words, cells = modality_dropout(part["text_words"] >= 0, part["cells"], rngs, self.image, self.text)
        part["text_ids"] = part["text_ids"].masked_fill(words, processor.mask_id)
        part["hidden"] = part["hidden"] | cells if "hidden" in part else cells

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        return False, False

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        if views.plan is None or not any(o.fused for o, _ in views.plan.objectives if o is not self):
            raise UserError("mdo hides words and cells for the other objectives of its pass, and here none reads the "
                            "pass's forward: give it one, such as passes: [{answers: {}, mdo: {}}].")  # fmt: skip
        return Scored(torch.zeros((), device=batch["group"].device))
