"""The model: embed, run the schedule, pool, head. Deterministic given the batch (and dropout)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from interlace.config import VLConfig
from interlace.decoder import TextDecoder
from interlace.embed.base import Pooler, pool
from interlace.embed.regions import Regions, check_boxes, whole_of_shown
from interlace.errors import UserError
from interlace.heads import Contrast, build_head
from interlace.loading import LoadedWhole
from interlace.schedule import Schedule
from interlace.streams import ALL, POOLED, Asked, Streams, Visibility, everyone, positions_of, take

TRAINED = ("tanh", "relu")  # pools that have weights, and read position 0


class Half(NamedTuple):
    """One stream as far as it can be computed without the other. Cheap to index by row, so that one encoded image can
    stand beside several texts."""

    states: Tensor  # (B, L, D)
    mask: Tensor | None  # (B, L), 1 = real; None = all real
    features: Tensor | None = None  # (B, F), the mean of a picture's, where the contrast head reads it

    def rows(self, index: Tensor) -> Half:
        return Half(*(None if one is None else one[index] for one in self))  # type: ignore[arg-type]

    def join(self, other: Half) -> Half:
        """The rows of both, one under the other; the shorter is padded. Raises nothing: lengths may differ."""
        return Half.stack([self, other])

    @staticmethod
    def stack(halves: list[Half]) -> Half:
        """The rows of all, one under the other; the shorter are padded."""
        long = max(half.states.shape[1] for half in halves)
        if any(half.mask is not None or half.states.shape[1] != long for half in halves):
            halves = [half.padded(long) for half in halves]
        return Half(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*halves)))  # type: ignore

    def padded(self, length: int) -> Half:
        extra = length - self.states.shape[1]
        if self.mask is None:
            mask = torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)
        else:
            mask = self.mask.bool()
        if not extra:
            return self._replace(mask=mask)
        states = nn.functional.pad(self.states, (0, 0, 0, extra))
        return self._replace(states=states, mask=nn.functional.pad(mask, (0, extra)))


def check_ids(ids: Tensor, words: int) -> None:
    """(B, T). Raises UserError for a number that no word has. On a CPU alone: another device would have to be waited
    for."""
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= words:
        wrong = least if least < 0 else most
        raise UserError(f"word {wrong}, but the model knows words 0 to {words - 1}: the tokenizer is another model's, "
                        "or has words that were added later.")  # fmt: skip


def check_mask(mask: Tensor | None) -> None:
    """(B, T). Raises UserError for padding before a word: its place would count, and the first state is what is pooled.
    On a CPU alone, as `check_ids`."""
    if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    real = mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise UserError("padding stands before a word, and half a model reads texts that are padded on the right: set "
                        "tokenizer.padding_side = 'right', or call the whole model.")  # fmt: skip


def padded_right(mask: Tensor | None, *given: Tensor | None) -> tuple[Tensor | None, tuple[Tensor | None, ...],
                                                                    Tensor | None]:  # fmt: skip
    """Mask (B, T) and what goes with each word, each (B, T, ...) -> the same with the words in front and all padding
    behind them, and where each place went (B, T), to be found again by `gather`; None where nothing had to move."""
    if mask is None or torch.compiler.is_compiling():
        return mask, given, None
    real = mask.bool()
    if not (real[:, 1:] & ~real[:, :-1]).any():
        return mask, given, None
    order = real.logical_not().long().argsort(dim=1, stable=True)  # (B, T): the words in their order, then the padding
    return mask.gather(1, order), tuple(x if x is None else x.gather(1, order) for x in given), order.argsort(1)


def _shown(mask: Tensor | None, hidden: Tensor | None, said: Tensor) -> Tensor | None:
    """Which of the features `said` (B, I, F) of a picture are real and not to be guessed, (B, I); None = all."""
    if hidden is None:
        return mask
    shown = ~hidden[:, hidden.shape[1] - said.shape[1] :]  # a whole picture before the cells is made of them
    return shown if mask is None else shown & mask.bool()


def _with_mask(embedded: Tensor | tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """States and mask; an embedder that knows better than the caller which positions are real returns both."""
    return embedded if isinstance(embedded, tuple) else (embedded, mask)


@dataclass
class VLOutput(ModelOutput):
    """States of both streams at the end of the schedule."""

    text: Tensor | None = None  # (B, T, D_text)
    image: Tensor | None = None  # (B, I, D_image)
    pooled_text: Tensor | None = None  # (B, D_text)
    pooled_image: Tensor | None = None  # (B, D_image)


class VLModel(LoadedWhole, PreTrainedModel):
    """Two embedders, a schedule, heads. `save_pretrained`, `from_pretrained`, `push_to_hub` as in transformers."""

    config_class = VLConfig
    base_model_prefix = "interlace"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    pixel_mean: Tensor  # (3, 1, 1), of embedders that read pixels
    pixel_std: Tensor
    accepts_loss_kwargs = False  # our losses are means: transformers must divide by the accumulation steps itself

    def __init__(self, config: VLConfig):
        super().__init__(config)
        self.text, self.image = config.text.build(), config.image.build()
        self.schedule = Schedule(config.segments, config.text.width, config.image.width)
        widths = config.text.width.size, config.image.width.size
        specs = {"text": config.text, "image": config.image}
        trained = {stream: spec for stream, spec in specs.items() if spec.pool in TRAINED}
        self.poolers = nn.ModuleDict({stream: Pooler(s.width, s.pool, s.pool_size) for stream, s in trained.items()})
        self.heads = nn.ModuleDict({name: build_head(name, o, *widths) for name, o in config.heads.items()})
        self.decoder = None
        if config.writes is not None:
            context = "text" if config.writes.context == "both" else config.writes.context
            self.decoder = TextDecoder(config.writes, config.writes.reads(config.text), specs[context].width, self,
                                       config.image.width)  # fmt: skip
        spec = config.image
        if hasattr(spec, "mean") and hasattr(spec, "std"):
            self.register_buffer("pixel_mean", torch.tensor(spec.mean).view(3, 1, 1))
            self.register_buffer("pixel_std", torch.tensor(spec.std).view(3, 1, 1))
        self.frozen: tuple[str, ...] = ()
        self.started: tuple[str, ...] = ()  # parameters that came from a pre-trained part
        self.anew: tuple[str, ...] = ()  # of a run's model that goes on: parts that the run did not have
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # BERT's and ViT's: normal, 0.02. Towers are initialised by their own class, then overwritten by their weights
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: heads and decoders read the words' table as well, so nothing may treat it as a part by itself (FSDP2
        would gather it for its own forward alone)."""

    # ------------------------------------------------------------------------------------------ shape of the model

    @property
    def fusion_depth(self) -> int:
        return self.schedule.fusion_depth

    @property
    def vocabulary(self) -> int:
        """How many words the text part knows, tasks that stand among them included."""
        tower = getattr(self.text, "tower", None)
        table: Any = self.text.words if tower is None else tower.get_input_embeddings()
        return table.num_embeddings + getattr(self.config.text, "tasks", 0)

    @property
    def fuses(self) -> bool:
        """False for late fusion: no layer lets the streams meet."""
        return self.fusion_depth < len(self.schedule.layers())

    @property
    def contrast(self) -> Contrast:
        """The head of that name; a preset's own offers the same `scale` and `project`."""
        return cast(Contrast, self.heads["contrast"])

    def freeze(self, *streams: str) -> None:
        """The towers (not their projections) of these streams, "text" and/or "image", stop learning: no gradient,
        and norm statistics and dropout as in evaluation, whatever mode the model is in."""
        for stream in streams:
            tower = getattr(getattr(self, stream), "tower", None)
            if tower is None:
                raise UserError(f"the {stream} part has no tower to freeze; only stems have.")
            tower.requires_grad_(False)
        self.frozen = tuple(streams)
        self.train(self.training)

    def freeze_named(self, patterns: list[str]) -> int:
        """Parameters whose names a regular expression finds stop learning; how many they are. A tower is frozen in part
        by "text.tower.encoder.layer.[0-3]\\.". Raises UserError for a pattern that finds none."""
        names = dict(self.named_parameters())
        frozen: set[str] = set()
        for pattern in patterns:
            try:
                found = {name for name in names if re.search(pattern, name)}
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}.") from None
            if not found:
                parts = sorted({".".join(name.split(".")[:3]) for name in names})
                raise UserError(f"no parameter has {pattern!r} in its name; they begin with {', '.join(parts[:20])}.")
            frozen |= found
        for name in frozen:
            names[name].requires_grad_(False)
        return len(frozen)

    def train(self, mode: bool = True) -> VLModel:
        super().train(mode)
        for stream in getattr(self, "frozen", ()):
            getattr(self, stream).tower.eval()
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None,
                                    every_n_layers: int = 1) -> None:  # fmt: skip
        # the schedule recomputes every layer, in its own way: the two options of transformers have nothing to set
        self.schedule.gradient_checkpointing = enable

    # ------------------------------------------------------------------------------------------------------- halves

    def normalise(self, pixels: Tensor | Regions) -> Tensor | Regions:
        """uint8 (B, 3, S, S) -> normalised float. Floats are taken as normalised already; regions are as they are."""
        if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
            dtype = self.pixel_mean.dtype
            return (pixels.to(dtype) / 255 - self.pixel_mean) / self.pixel_std
        return pixels

    def see(self, text_mask: Tensor | None, image_mask: Tensor | None) -> Visibility:
        return everyone(text_mask, image_mask)

    def half_text(self, input_ids: Tensor, mask: Tensor | None = None, type_ids: Tensor | None = None,
                  see: Visibility | None = None, for_vector: bool = False) -> Half:  # fmt: skip
        """Words (B, T) -> the text stream just before fusion. `see`: which words may look at which, if not all at all;
        then `fuse` is given the same. `for_vector`: nobody will read it but `alone`, so it may hold the one state that
        makes the vector. Raises UserError for words the model does not have, too many of them, and padding before
        them."""
        check_ids(input_ids, self.vocabulary)
        check_mask(mask)
        states, mask = _with_mask(self.text(input_ids, mask, type_ids), mask)
        return self._half("text", states, mask, see or everyone(mask, None), for_vector)

    def _half(self, stream: str, states: Tensor, mask: Tensor | None, see: Visibility, for_vector: bool = False,
              features: Tensor | None = None) -> Half:  # fmt: skip
        at = self._of_vector(stream, states, mask) if for_vector and not self._goes_on(stream) else None
        given, asked = (dict.fromkeys(Streams._fields) | {stream: x} for x in (states, at))
        here = Asked(asked["text"], asked["image"])
        out = self.schedule.run(Streams(**given), see, stop=self._alone, asked=here)
        return Half(getattr(out, stream), mask if at is None else None, features)

    def _of_vector(self, stream: str, states: Tensor, mask: Tensor | None) -> Tensor | None:
        """Where the state stands that the stream's vector is made of, (B or 1, 1); None: it is made of several."""
        how = "mean" if self._reads_whole else getattr(self.config, stream).pool
        if how in ("first", *TRAINED):
            return torch.zeros(1, 1, dtype=torch.long, device=states.device)
        if how == "last":
            last = torch.full((1, 1), states.shape[1] - 1, device=states.device)
            return last if mask is None else mask.long().sum(1, keepdim=True).clamp(min=1) - 1
        return None

    def half_image(self, pixel_values: Tensor | Regions, mask: Tensor | None = None,
                   hidden: Tensor | None = None, for_vector: bool = False) -> Half:  # fmt: skip
        """Pixels (B, 3, S, S), uint8 or normalised float, or regions -> the image stream just before fusion. `mask`
        (B, I); of pixels (B, H, W) for pictures of unequal sizes, if the embedder takes such. `hidden` (B, I) bool,
        True = a region, patch or cell to be guessed. `for_vector` as in `half_text`. Raises UserError when the image
        part cannot hide any, and, unless it trains, for boxes outside the picture or with their corners in the wrong
        order."""
        return self._half_image(self.normalise(pixel_values), mask, hidden, for_vector)

    def _half_image(self, pixels: Tensor | Regions | None, mask: Tensor | None, hidden: Tensor | None,
                    for_vector: bool = False, **given: Any) -> Half:  # fmt: skip
        if getattr(self.image, "reads_words", False):  # its regions share tables of the words (types, positions, norm)
            given["words"] = self.text
        if getattr(self.image, "masks_pixels", False):
            given["mask"] = mask
        features = None
        head = dict(self.heads.items()).get("contrast")
        if isinstance(head, Contrast) and head.features:
            if not isinstance(pixels, Regions) and given.get("states") is None:
                given["states"], pixels = self.image.states(pixels), None  # type: ignore[operator]
            said = pixels.features if isinstance(pixels, Regions) else given["states"]
            features = pool(said, _shown(mask, hidden, said), "mean")
        if hidden is not None:
            if isinstance(pixels, Regions):
                pixels = pixels._replace(hidden=hidden)
                if getattr(self.image, "whole_of_shown", False):
                    pixels = whole_of_shown(pixels, mask)
            elif getattr(self.image, "hides", False):
                given["hidden"] = hidden
            else:
                raise UserError(f"the image part {self.config.image.name!r} has nothing to put in the place of a "
                                "hidden cell: choose one that has (`hide: true`), or leave the objective out.")
        states = self.image(pixels, **given)
        if isinstance(pixels, Regions) and not self.training:
            check_boxes(pixels.boxes, mask)
        states, mask = _with_mask(states, mask)
        return self._half("image", states, mask, everyone(None, mask), for_vector, features)

    def half_from(self, stream: str, tower_states: Tensor, mask: Tensor | None = None,
                  hidden: Tensor | None = None) -> Half:  # fmt: skip
        """What a stem's tower said, (B, L, C), kept from before -> that stream just before fusion."""
        if stream == "image":
            return self._half_image(None, mask, hidden, states=tower_states)
        return self._half("text", self.text(None, states=tower_states), mask, everyone(mask, None))

    @property
    def _alone(self) -> int:
        return self.fusion_depth if self.fuses else len(self.schedule.layers())

    def fuse(self, text: Half | None, image: Half | None, see: Visibility | None = None,
             asked: Asked = ALL) -> VLOutput:  # fmt: skip
        """From the halves to the end of the schedule. With late fusion nothing is left to do. A half may be absent.

        `asked`: the states that somebody will read, by their positions; the output holds these alone, (B, n, D), and
        the last layer computes no others: `fuse(text, image, asked=POOLED).pooled_text`. The pooled vectors are the
        same whatever states are asked for, and so is every state, rounding aside; a vector that is not asked for either
        is (B, 0).
        """
        halves = {"text": text, "image": image}
        masks = {stream: None if half is None else half.mask for stream, half in halves.items()}
        given = {stream: None if half is None else half.states for stream, half in halves.items()}
        computed = {stream: self._to_compute(stream, x, asked) for stream, x in given.items()}
        see = everyone(*masks.values()) if see is None else see
        here = Asked(computed["text"], computed["image"])
        states = self.schedule.run(Streams(**given), see, self._alone, asked=here)._asdict()
        pooled: dict[str, Tensor | None] = {}
        for stream, x in states.items():
            read = stream in asked.pooled
            pooled[stream] = self.pooled(x, masks[stream], stream) if read or x is None else x.new_zeros(len(x), 0)
            if x is not None and computed[stream] is None:
                states[stream] = take(x, getattr(asked, stream))
            elif x is not None and read:
                states[stream] = x[:, 1:]
        return VLOutput(states["text"], states["image"], pooled["text"], pooled["image"])

    def _to_compute(self, stream: str, states: Tensor | None, asked: Asked) -> Tensor | None:
        """The asked positions, behind the one that the stream's vector is made of if that is read; None = all, where it
        is made of more than the first, or all but a few are asked for."""
        at = getattr(asked, stream)
        if states is None or at is None:
            return None
        at = at.to(states.device)
        if stream not in asked.pooled:
            return at
        if getattr(self.config, stream).pool not in ("first", *TRAINED) or at.shape[1] + 1 >= states.shape[1]:
            return None
        return nn.functional.pad(at, (1, 0))  # position 0 in front

    def asked_by(self, head: str) -> Asked:
        """What a head over pooled vectors reads: no states, and of the vectors those of the streams it says (`reads`),
        if it does. The other's is (B, 0) then."""
        return POOLED._replace(pooled=getattr(self.heads[head], "reads", POOLED.pooled))

    def words_where(self, text: Half, image: Half | None, which: Tensor) -> Tensor:
        """The states of some words at the end of the schedule: `which` (B, T) bool -> (n, D), row by row."""
        at = positions_of(which)
        states = self.fuse(text, image, asked=Asked(at, POOLED.image, pooled=())).text
        assert states is not None
        return states[which.gather(1, at)]

    def pooled(self, states: Tensor | None, mask: Tensor | None, stream: str) -> Tensor | None:
        """(B, L, D) -> (B, D), as the stream's embedder says; None for a stream that is not there."""
        if states is None:
            return None
        if stream in self.poolers:
            return self.poolers[stream](states)
        return pool(states, mask, getattr(self.config, stream).pool)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | Regions,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_,
    ) -> VLOutput:
        """Words (B, T) and pixels (B, 3, S, S) or regions -> states of both streams. Masks (B, T), (B, I): 1 = real.
        Texts may be padded on either side: the states of a word stand where it stood (where a system puts tokens of its
        own among the words, in front of all padding). Raises UserError for another number of texts than of pictures.
        """
        pictures = len(pixel_values if isinstance(pixel_values, Tensor) else pixel_values.features)
        if len(input_ids) != pictures:
            raise UserError(f"{len(input_ids)} texts and {pictures} pictures: row n of one belongs to row n of the "
                            "other, so there must be as many.")  # fmt: skip
        mask, (ids, types), places = padded_right(attention_mask, input_ids, token_type_ids)
        assert ids is not None
        out = self.fuse(self.half_text(ids, mask, types), self.half_image(pixel_values, image_mask))
        if places is not None and out.text is not None and out.text.shape[:2] == places.shape:
            out.text = out.text.gather(1, places.unsqueeze(-1).expand_as(out.text))
        return out

    # -------------------------------------------------------------------------------------------------- one vector

    def alone(self, half: Half, stream: str) -> Tensor:
        """A stream's vector in the contrast space without the other stream: (B, P), L2-normalised."""
        if "contrast" not in self.heads:
            raise UserError("this model has no contrast head, so a text or picture alone has no vector; "
                            "train it with the itc objective.")  # fmt: skip
        return self.contrast.project(self.pooled_alone(half, stream), stream)

    def pooled_alone(self, half: Half, stream: str) -> Tensor:
        """What the contrast head projects of a stream without the other: (B, D).

        Where the streams first meet after some layers of their own, that is where the half already stands (ALBEF: align
        before fusing). A stream that meets the other in its very first layer (BLIP's text) goes on to the end of the
        schedule with the partner absent. A head that reads the `whole` takes means: of the words' states at the end of
        the schedule, since a pooler made for pairs has learnt to say one thing, whether they match; of the picture's
        features as the tower or detector gave them, or where there are none of its states before the schedule, since
        layers that were made for words make cells alike when there are no words among them.
        """
        states, mask = half.states, half.mask
        if stream == "image" and half.features is not None:
            return half.features
        if self._goes_on(stream):
            at = self._of_vector(stream, states, mask)
            given, real, asked = (dict.fromkeys(Streams._fields) | {stream: x} for x in (states, mask, at))
            here = Asked(asked["text"], asked["image"])
            out = self.schedule.run(Streams(**given), everyone(*real.values()), self.fusion_depth, asked=here)
            states, mask = getattr(out, stream), mask if at is None else None
        pooled = pool(states, mask, "mean") if self._reads_whole else self.pooled(states, mask, stream)
        assert pooled is not None
        return pooled

    @property
    def _reads_whole(self) -> bool:
        return "contrast" in self.heads and getattr(self.contrast, "whole", False)

    def _goes_on(self, stream: str) -> bool:
        """Whether the vector of a stream alone is made of its states at the end of the schedule, not of the half's."""
        if not self.fuses:
            return False
        if self._reads_whole:
            return stream == "text"
        return not any(stream in layer.changes for layer in self.schedule.layers()[: self.fusion_depth])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T), padded on either side -> (B, P), L2-normalised."""
        mask, (ids,), _ = padded_right(attention_mask, input_ids)
        assert ids is not None
        return self.alone(self.half_text(ids, mask, for_vector=True), "text")

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P), L2-normalised."""
        return self.alone(self.half_image(pixel_values, for_vector=True), "image")


AutoModel.register(VLConfig, VLModel)
