"""What reads the states at the end: one small module per kind of answer. Each is built from `VLConfig.heads`."""

from __future__ import annotations

from typing import Any

from torch import nn

from interlace.errors import UserError, suggest
from interlace.heads.pair import Answers, Contrast, Match
from interlace.heads.pixels import Pixels
from interlace.heads.predict import Linear, Tied, Transformed
from interlace.heads.sigmoid import SigmoidContrast

HEADS: dict[str, type[nn.Module]] = {"contrast": Contrast, "match": Match, "answers": Answers, "linear": Linear,
                                     "transformed": Transformed, "tied": Tied, "pixels": Pixels,
                                     "sigmoid_contrast": SigmoidContrast}  # fmt: skip

__all__ = ["HEADS", "Answers", "Contrast", "Linear", "Match", "Pixels", "SigmoidContrast", "Tied", "Transformed",
           "build_head", "task_head"]  # fmt: skip


def build_head(name: str, options: dict[str, Any], text: int, image: int) -> nn.Module:
    """The head of that name for streams of these widths; option `kind` names another class than `name` does, so that a
    model may have several of one kind. A preset's own head enters HEADS in the preset's file. Raises UserError for an
    unknown kind."""
    options = dict(options)
    kind = options.pop("kind", name)
    if kind not in HEADS:
        import interlace.presets  # noqa: F401  a preset's own head is known once its file is imported
    if kind not in HEADS and kind == name:  # an objective asked for it by its name, and no preset has brought it
        from interlace.objectives.base import Objective, who_has

        if asking := [one.name for one in Objective.known.values() if one.head == name]:
            raise UserError(f"{', '.join(asking)} needs the {name!r} head, whose size the data's detector decides, and "
                            f"this model has none.{who_has(name)}")  # fmt: skip
    if kind not in HEADS:
        raise UserError(f"no head is called {kind!r} (known: {', '.join(HEADS)}).{suggest(kind, HEADS)}")
    return HEADS[kind](text, image, **options)


def task_head(heads: nn.ModuleDict, name: str, made_by: str) -> nn.Module:
    """The head of that name, of a model that was made for one task. `made_by`: the preset that has it. Raises UserError
    for a model without it."""
    if name not in heads:
        raise UserError(f"expected a model with a head {name!r}, and this one has {', '.join(heads) or 'none'}: build "
                        f"it with {made_by}(), or load its weights by that preset.")  # fmt: skip
    return heads[name]
