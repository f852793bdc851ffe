"""What a model learns by. An objective is one small class: which columns, what is hidden, who sees whom, which head.

Its data side (`prepare`, `corrupt`) runs in the loader's workers and draws all its randomness from the generators it is
given; its model side (`loss`) is deterministic given the batch, dropout aside. A `Pass` is the objectives that share
one forward; a recipe mixes passes.
"""

from __future__ import annotations

import inspect
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from interlace.embed.regions import Regions
from interlace.errors import UserError, suggest
from interlace.model import Half, VLModel, VLOutput
from interlace.streams import Asked, Streams, Visibility, everyone, positions_of

if TYPE_CHECKING:
    from interlace.data.batches import Drawer
    from interlace.data.processor import Augment, Processor
    from interlace.data.rows import Pair
    from interlace.embed.base import Embedder
    from interlace.objectives.whole import Ahead, Whole

Batch = dict[str, Any]


class Views:
    """One pass over one batch: its shared forward, and the halves that no objective changed, which all passes of a step
    share: the image is encoded once, however many objectives ask."""

    def __init__(self, model: VLModel, batch: Batch, part: Batch | None = None, plan: Pass | None = None,
                 shared: Views | None = None):  # fmt: skip
        """`part`: the pass's own tensors. `shared`: the views of another pass of this step."""
        self.model, self.batch, self.part, self.plan = model, batch, part or {}, plan
        self._halves: dict[str, Half] = {} if shared is None else shared._halves
        self._vectors: dict[str, Tensor] = {} if shared is None else shared._vectors
        self.ahead: Ahead | None = None if shared is None else shared.ahead
        self._fused: VLOutput | None = None

    @property
    def size(self) -> int:
        return len(self.batch["group"])

    @property
    def order(self) -> list[str]:
        """Names of the vectors, in the order in which they were computed."""
        return list(self._vectors)

    def whole(self, objective: Objective) -> Whole | None:
        """What the objective asked to know of the other rows of the optimiser step; None where it is all in here."""
        return None if self.ahead is None else self.ahead.whole.get(objective)

    def image(self) -> Half:
        if "image" not in self._halves:
            self._halves["image"] = self._read_image()
        return self._halves["image"]

    def _read_image(self, hidden: Tensor | None = None, for_vector: bool = False) -> Half:
        kept = self.batch.get("image_states")
        if kept is not None:
            return self.model.half_from("image", kept, hidden=hidden)
        if "region_features" in self.batch:
            regions = Regions(self.batch["region_features"], self.batch.get("region_boxes"))
            return self.model.half_image(regions, self.batch.get("region_mask"), hidden, for_vector)
        return self.model.half_image(self.batch["pixel_values"], None, hidden, for_vector)

    def text(self, name: str) -> Half:
        """`name`: "caption", "question", "other" -> the half of the words in `{name}_ids`, `{name}_mask`."""
        if name not in self._halves:
            self._halves[name] = self._read_text(name)
        return self._halves[name]

    def _read_text(self, name: str, for_vector: bool = False) -> Half:
        kept, mask = self.batch.get(f"{name}_states"), self.batch.get(f"{name}_mask")
        if kept is not None:
            return self.model.half_from("text", kept, mask)
        return self.model.half_text(self.batch[f"{name}_ids"], mask, for_vector=for_vector)

    def vector(self, name: str) -> Tensor:
        """"image" or the name of a text -> (B, P), L2-normalised, in the contrast space."""
        if name not in self._vectors:
            if name not in self._halves and self._only_vectors:
                half = self._read_image(for_vector=True) if name == "image" else self._read_text(name, for_vector=True)
            else:
                half = self.image() if name == "image" else self.text(name)
            self._vectors[name] = self.model.alone(half, "image" if name == "image" else "text")
        return self._vectors[name]

    @property
    def _only_vectors(self) -> bool:
        """Nothing the model learns by reads a half but through its vector."""
        objectives = getattr(self.model, "objectives", [])
        return bool(objectives) and all(o.only_vectors for o, _ in objectives)

    # ------------------------------------------------------------------------------------ the pass's one forward

    def fused(self) -> VLOutput:
        """The pass's sentence and picture, as its objectives left them, through the whole model, once."""
        if self._fused is None:
            assert self.plan is not None, "only a pass has a shared forward"
            hidden = self.part.get("hidden")
            image = None
            if self.plan.image:
                image = self.image() if hidden is None else self._read_image(hidden)
            see = self.plan.visibility(self.part, self._text_mask(), None if image is None else image.mask)
            if "text_ids" in self.part:
                text = self.model.half_text(self.part["text_ids"], self.part["text_mask"], see=see)
            else:  # nothing in it is hidden and nobody's sight is limited
                text = self.text("caption")
            asked = self._who_is_asked(text, image)
            words, cells = (which if which is None else positions_of(which) for which in asked)
            self._at = Asked(words, cells, self._pooled())
            self._fused = self.model.fuse(text, image, see, self._at)
            self.text_mask, self.image_mask = text.mask, None if image is None else image.mask
        return self._fused

    def _pooled(self) -> tuple[str, ...]:
        """The streams whose pooled vectors a head of the pass may read."""
        assert self.plan is not None
        heads = dict(self.model.heads.items())
        read = [getattr(heads.get(o.head), "reads", Streams._fields) for o, _ in self.plan.objectives if o.fused]
        return tuple(stream for stream in Streams._fields if any(stream in one for one in read))

    def _who_is_asked(self, text: Half, image: Half | None) -> list[Tensor | None]:
        """(B, T) and (B, I) bool: the states that some objective of the pass reads; None = all."""
        assert self.plan is not None
        wanted = [o.asks(self.part) for o, _ in self.plan.objectives if o.fused]
        every: list[Tensor | None] = []
        for lead, half, asked in zip((0, self._lead), (text, image), zip(*wanted)):
            if half is None or any(which is True for which in asked):
                every.append(None)
                continue
            some = [which for which in asked if isinstance(which, Tensor)]
            every.append(nn.functional.pad(torch.stack(some).any(0), (lead, 0)) if some
                         else half.states.new_zeros(half.states.shape[:2], dtype=torch.bool))  # fmt: skip
        return every

    @property
    def _lead(self) -> int:
        """How many states stand before a picture's cells: class tokens, a whole picture."""
        return getattr(self.model.image, "lead", 0)

    def words_where(self, which: Tensor) -> Tensor:
        """(B, T) bool, no others than its `asks` said -> (n, D): the states of these words, row by row."""
        states = self.fused().text
        assert states is not None
        return states[which if self._at.text is None else which.gather(1, self._at.text)]

    def cells_where(self, which: Tensor) -> Tensor:
        """(B, I) bool, no others than its `asks` said -> (n, D): the states of these regions, patches or cells."""
        states, which = self.fused().image, nn.functional.pad(which, (self._lead, 0))
        assert states is not None
        return states[which if self._at.image is None else which.gather(1, self._at.image)]

    def _text_mask(self) -> Tensor | None:
        return self.part["text_mask"] if "text_ids" in self.part else self.batch.get("caption_mask")

    def cells(self) -> Tensor:
        """(B, I, D): states of the regions, patches or grid cells alone, without class tokens."""
        image = self.fused().image
        assert image is not None and self._at.image is None, "an objective reads all cells and asks for some"
        return image[:, self._lead :]

    @property
    def matched(self) -> Tensor:
        """(B,) bool, False = the pass's sentence was swapped for another picture's."""
        return self.part["matched"] if "matched" in self.part else torch.ones_like(self.batch["caption_real"])

    def total(self, objective: Objective) -> Tensor:
        """How many things the objective scores in an average micro-batch of the whole batch, over all ranks: what its
        sum of losses is divided by, so that neither accumulation nor the number of ranks changes the loss."""
        known = self.part.get("totals", {}).get(objective.key)
        if known is not None:
            return known.clamp(min=1e-6)
        count = objective.count(self.part, self.batch)
        assert count is not None, f"{objective.name} asks for a total it does not count"
        return count.clamp(min=1)


@dataclass
class Scored:
    """A loss and what is logged beside it, by name."""

    loss: Tensor  # scalar
    logs: dict[str, Tensor] = field(default_factory=dict)  # scalars


@dataclass
class Pairs:
    """What a head reads of N pairs of text and picture: `text` (N, Dt), `image` (N, Di). `target` (N, ...) as the
    objective's `score` takes it, `weight` (N,), 0 = not scored, `row` (N,) whose of the batch it is."""

    text: Tensor
    image: Tensor
    target: Tensor
    weight: Tensor
    row: Tensor


class Objective:
    """Subclasses set `name` and `head` and write `prepare` and `loss`."""

    name: ClassVar[str] = ""
    head: ClassVar[str] = ""  # which of heads.HEADS it reads
    fused: ClassVar[bool] = False  # it reads the pass's shared forward
    hides_cells: ClassVar[bool] = False  # it hides parts of the picture
    only_vectors: ClassVar[bool] = False  # it reads `views.vector` and nothing else of the model's streams
    reads_pixels: ClassVar[bool] = False  # of the picture itself, even where what a frozen tower said of it is kept
    by_words: tuple[str, ...] = ()  # texts it wants as ids, even where what a frozen tower said of them is kept
    stage: ClassVar[int] = 2  # of a row: 0 chooses the sentence, 1 swaps it for another's, 2 does neither
    known: ClassVar[dict[str, type[Objective]]] = {}
    key: str = ""  # its name, or another where a pass has two of a kind

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Objective.known[cls.name] = cls

    def head_options(self) -> dict[str, Any]:
        """Options of its head in `VLConfig.heads`, for a model that is composed; a preset has its own heads."""
        return {}

    def head_for(self, text: Embedder, image: Embedder) -> dict[str, Any]:
        """The same, where the head's sizes are those of the parts."""
        return self.head_options()

    def check(self, model: VLModel) -> None:
        """Raises UserError when the model lacks a part this objective needs."""
        if self.head and self.head not in model.heads:
            raise UserError(f"{self.name} needs the {self.head!r} head, and this model has "
                            f"{', '.join(sorted(model.heads)) or 'no heads'}.{who_has(self.head)}")  # fmt: skip

    def prepare(self, sample: dict[str, Any], row: Pair, index: int, draw: Drawer, rng: np.random.Generator) -> None:
        """Data side, a row at a time: adds what this objective wants to `sample` (texts under `texts[name]`, tensors
        under their name), or to `sample["part"]`, what the pass alone sees: its `text` starts as the caption. `row` is
        the source's pair at `index`."""

    def corrupt(self, part: Batch, rngs: list[np.random.Generator], processor: Processor) -> None:
        """Data side, a batch at a time, after the words became numbers: hides what is to be guessed in `part`
        (`text_ids`, `text_mask` (B, T), `text_words` (B, T) the number of each token's word, -1 = special or padding;
        `cells` (B, I) bool, True = a real region or cell). One generator a row, so that a row's draw is its own."""

    def visibility(self, part: Batch, text_mask: Tensor | None, image_mask: Tensor | None) -> Visibility | None:
        """Who may see whom in the pass; None: everyone everyone."""
        return None

    def count(self, part: Batch, batch: Batch) -> Tensor | None:
        """How many things it scores, a scalar known before the forward; None: it divides by rows and needs no total."""
        return None

    def asks(self, part: Batch) -> tuple[bool | Tensor, bool | Tensor]:
        """Which states of the pass's shared forward it reads, of the words (B, T) and of the cells (B, I), as bool
        masks; True = all of them, which is always right, False = none, only pooled vectors. The last layer computes
        what some objective of the pass asks for."""
        return True, True

    def loss(self, model: VLModel, batch: Batch, views: Views) -> Scored:
        raise TypeError(f"{type(self).__name__} has to write its loss()")

    # ------------------------------------------ of a head over pooled pairs, which can learn alone: see heads_first.py

    def pairs(self, model: VLModel, batch: Batch, views: Views) -> Pairs | None:
        """What its head reads of these rows; None: it reads something else."""
        return None

    def score(self, logits: Tensor, target: Tensor, weight: Tensor) -> Scored:
        """The loss of what the head says of pairs."""
        raise TypeError(f"{type(self).__name__} has pairs() and needs a score()")

    # ----------------------------------------------------- where a row's loss depends on other rows: see whole.py

    def check_batch(self, batch: int, micro: int, rows: int) -> None:
        """Raises UserError when it cannot learn from optimiser steps of `batch` rows over all ranks, `micro` at a time
        on one, out of `rows`."""

    def check_augment(self, augment: Augment) -> None:
        """Raises UserError when pictures varied so no longer show what their texts say."""

    def looks(self, parts: int) -> bool:
        """Whether it must know the whole step before the first of `parts` micro-batches is learned from."""
        return False

    def look(self, model: VLModel, batch: Batch, views: Views) -> dict[str, Tensor]:
        """Without gradient: what the step's other rows must know of these, each (B, ...)."""
        return {}

    def settle(self, model: VLModel, rows: dict[str, Tensor]) -> Any:
        """Once a step: what `look` said of all N rows, (N, ...) -> anything that `loss` finds as
        `views.whole(self).settled`."""
        return None

    def wants(self, whole: Whole) -> Tensor | None:
        """(B,) numbers of rows of the whole batch whose pictures it wants as `whole.partners`; then its `look` says
        `item` too."""
        return None

    # ------------------------------------------------------------ what it keeps beside the model, from step to step

    def attach(self, model: VLModel, batch: int, rows: int) -> nn.Module | None:
        """State that training needs and the saved model does not (a slow copy, a queue), for optimiser steps of `batch`
        rows out of `rows`. Found as `model.beside[self]`; checkpoints hold its `state_dict()`."""
        return None

    def before_step(self, model: VLModel, epoch: float) -> None:
        """Before the first forward of an optimiser step. `epoch`: how many have passed, 0.5 in the middle of the
        first."""

    def after_step(self, model: VLModel) -> None:
        """After the last backward of an optimiser step."""


@dataclass
class Pass:
    """Objectives that share one forward: what one hides, all see hidden. `share`: how often the pass is drawn, where
    passes are drawn. `image` False: words alone, without the picture (VL-BERT's books and Wikipedia)."""

    objectives: list[tuple[Objective, float]]
    share: float = 1.0
    image: bool = True
    name: str = ""  # before the names of what it logs, where two passes have an objective in common

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        for objective, _ in self.objectives:
            seen[objective.name] += 1
            objective.key = objective.name if seen[objective.name] == 1 else f"{objective.name}{seen[objective.name]}"
        limited = [o.name for o, _ in self.objectives if type(o).visibility is not Objective.visibility]
        if len(limited) > 1:
            raise UserError(f"{' and '.join(limited)} say who may see whom and cannot share one forward: give each a "
                            "pass of its own.")  # fmt: skip

    @property
    def fused(self) -> bool:
        return any(o.fused for o, _ in self.objectives)

    @property
    def corrupts(self) -> bool:
        return any(type(o).corrupt is not Objective.corrupt for o, _ in self.objectives)

    @property
    def limits_sight(self) -> bool:
        return any(type(o).visibility is not Objective.visibility for o, _ in self.objectives)

    def in_stages(self) -> list[Objective]:
        """Who chooses the sentence first, then who swaps it, then who asks for other texts."""
        return sorted((o for o, _ in self.objectives), key=lambda o: o.stage)

    def visibility(self, part: Batch, text_mask: Tensor | None, image_mask: Tensor | None) -> Visibility:
        for objective, _ in self.objectives:
            see = objective.visibility(part, text_mask, image_mask)
            if see is not None:
                return see
        return everyone(text_mask, image_mask)

    def totals(self, part: Batch, batch: Batch) -> dict[str, Tensor]:
        """What each objective counts in this micro-batch, by its key."""
        counts = {o.key: o.count(part, batch) for o, _ in self.objectives}
        return {key: count.float() for key, count in counts.items() if count is not None}


def who_has(head: str) -> str:
    """" Systems that have it: ...", for an error; nothing when none has."""
    return systems_where(lambda config: head in getattr(config, "heads", {}))


def systems_where(has: Callable[[Any], bool]) -> str:
    """" Systems that have it: ...": those whose configuration, as published, has what is missing."""
    from interlace.presets import PRESETS

    systems = [name for name, line in PRESETS.items() if has(line.make())]
    return f" Systems that have it: {', '.join(systems)}." if systems else ""


def hides(config: Any) -> bool:
    """Whether a configuration's image part has something to put in the place of what is to be guessed."""
    image = getattr(config, "image", None)
    return getattr(image, "hide", False) or hasattr(image, "features") or getattr(image, "name", "") == "blocks"


def build_objective(name: str, options: dict[str, Any]) -> Objective:
    """The objective of that name. Raises UserError for an unknown name or option, or one of a wrong type."""
    check_options(name, options)
    try:
        return Objective.known[name](**options)
    except TypeError as error:
        raise UserError(f"objective {name}: {error}") from None


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises UserError for an unknown objective, an option it does not have, or a plain type it does not take."""
    if name not in Objective.known:
        known = ", ".join(sorted(Objective.known))
        raise UserError(f"no objective is called {name!r} (known: {known}).{suggest(name, Objective.known)}")
    cls = Objective.known[name]
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                has = [*parameters, "weight"]  # the weight is taken out by whoever sums the losses
                raise UserError(f"objective {name} has no option {option!r}; it has {', '.join(has)}."
                                f"{suggest(str(option), has)}")  # fmt: skip
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # a hint that is imported for type checkers only
        hints = {}
    for option, value in options.items():
        check_type(f"objectives.{name}.{option}", value, hints.get(option))


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raises UserError for a text where a number is expected and the like; other types are the objective's to check."""
    fits: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
    if hint in fits and (not isinstance(value, fits[hint]) or isinstance(value, bool) != (hint is bool)):
        words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
        raise UserError(f"{key}: expected {words[hint]}, got {value!r}.")


def mean(values: Tensor, real: Tensor) -> Tensor:
    """Mean of `values` (B,) where `real` (B,): for logs. Zero when nothing is real."""
    return (values * real).sum() / real.sum().clamp(min=1)


def cross_entropy_soft(logits: Tensor, target: Tensor) -> Tensor:
    """(B, C) logits, (B, C) target whose rows sum to 1 or 0 -> (B,)."""
    return -(target * torch.log_softmax(logits, -1)).sum(-1)
