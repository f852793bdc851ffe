"""A model's configuration: two embedders, named segments, heads. It round-trips through config.json."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from interlace.decoder import Decoder
from interlace.embed.base import Embedder, embedder_from_dict
from interlace.embed.grid import GridRegions  # noqa: F401  named here so that config.json finds it
from interlace.embed.patches import Patches
from interlace.embed.regions import LXMERTRegions  # noqa: F401  imports every merge of regions, as below
from interlace.embed.stem import ImageStem, TextStem  # noqa: F401  named here so that config.json finds them
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Kind, Width
from interlace.schedule import Segments, describe, fused


def _kinds(given: list) -> list[Kind]:
    return [k if isinstance(k, Kind) else Kind(k["name"], tuple(sorted(k.get("options", {}).items()))) for k in given]


class VLConfig(PreTrainedConfig):
    """`text`, `image`: embedders. `segments`: the boxes of the paper's figure. `heads`: name -> options. `writes`: a
    decoder over the final states, if the model has one.

    >>> VLConfig(text=Words(Width(768)), image=Patches(Width(768)), segments={"joint": [JOINT] * 12})
    >>> VLConfig(text=Words(Width(768)), image=Patches(Width(768)), fusion="mid", streams="dual", layers=6)
    """

    model_type = "interlace"

    def __init__(
        self,
        text: Embedder | dict | None = None,
        image: Embedder | dict | None = None,
        segments: Segments | list | None = None,
        fusion: str | None = None,
        streams: str | None = None,
        layers: int | None = None,
        heads: dict[str, dict[str, Any]] | None = None,
        writes: Decoder | dict | None = None,
        **kwargs: Any,
    ):
        # transformers builds every config once without arguments to learn its defaults; so there must be some
        text = Words(Width(64, heads=4)) if text is None else text
        image = Patches(Width(64, heads=4)) if image is None else image
        self.text = text if isinstance(text, Embedder) else embedder_from_dict(text)
        self.image = image if isinstance(image, Embedder) else embedder_from_dict(image)
        if self.text.stream != "text" or self.image.stream != "image":
            raise UserError(f"text wants an embedder of words and image one of pixels or regions; got "
                            f"{self.text.name!r} and {self.image.name!r}.")  # fmt: skip
        if segments is None:
            segments = fused(fusion or "mid", streams or "dual", 4 if layers is None else layers, self.text.width.norm)
        elif fusion is not None or streams is not None or layers is not None:
            raise UserError("give either segments or the line fusion/streams/layers, not both: segments already say "
                            "where the streams meet.")  # fmt: skip
        pairs = segments.items() if isinstance(segments, dict) else segments
        self.segments: Segments = {name: _kinds(kinds) for name, kinds in pairs}
        self.heads: dict[str, dict[str, Any]] = heads or {}
        self.writes = Decoder(**writes) if isinstance(writes, dict) else writes
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        plain = super().to_dict()
        plain["text"], plain["image"] = self.text.to_dict(), self.image.to_dict()
        # a list, since config.json is written with sorted keys and the order of the segments is the model
        plain["segments"] = [[name, [{"name": k.name, "options": dict(k.options)} for k in kinds]]
                             for name, kinds in self.segments.items()]  # fmt: skip
        plain["writes"] = None if self.writes is None else self.writes.to_dict()
        return plain

    def describe(self) -> str:
        """The figure in words: embedders, then one line per segment."""
        return f"{'text':10s} {self.text.name} {self.text.width.size}\n{'image':10s} {self.image.name} " \
               f"{self.image.width.size}\n" + describe(self.segments) \
               + ("" if self.writes is None else f"\n{describe(dict(self.writes.segments))} (the decoder; it reads "
                  f"{self.writes.context})")  # fmt: skip


AutoConfig.register("interlace", VLConfig)
