"""A decoder: a second schedule over (what is written, what is read), with a memory of keys and values between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from interlace.embed.base import Embedder, embedder_from_dict
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.heads import Tied
from interlace.layers import Attend, Kind, Read, Text, Width
from interlace.schedule import Schedule, Segments
from interlace.streams import Sight, Streams, Visibility, sight

SHAREABLE = ("words", "attend_self", "attend_image", "ffn")


@dataclass
class Decoder:
    """`segments`: layers of the kinds read and text. `context`: whose final states they read, "image", "text" (a
    question that has seen the image) or "both" (the start of a text and the image, SimVLM). `shares`: parts that are
    the model's own and have no weights here: "words", and of each layer "attend_self", "attend_image", "ffn", which are
    those of the same layer of the segment `like`. `start`, `end`: the ids a text begins and ends with. `words`: the
    words it writes, where the model's text part is a tower; else those the model reads."""

    segments: Segments | list
    context: str = "image"
    shares: tuple[str, ...] = ()
    like: str = ""
    start: int = 30522
    end: int = 102
    words: Words | dict | None = None

    def __post_init__(self) -> None:
        pairs = self.segments.items() if isinstance(self.segments, dict) else self.segments
        self.segments = {name: [k if isinstance(k, Kind) else Kind(k["name"], tuple(sorted(k["options"].items())))
                                for k in kinds] for name, kinds in pairs}  # fmt: skip
        self.shares = tuple(self.shares)
        if isinstance(self.words, dict):
            self.words = cast(Words, embedder_from_dict(self.words))
        if self.context not in ("image", "text", "both"):
            raise UserError("a decoder reads the states of the image or of the text, or both; got "
                            f"context={self.context!r}.")  # fmt: skip
        if wrong := [part for part in self.shares if part not in SHAREABLE]:
            raise UserError(f"a decoder can share {', '.join(SHAREABLE)}; got {', '.join(wrong)}.")
        if self.words is not None and "words" in self.shares:
            raise UserError("a decoder has words of its own or shares the model's: leave out one of the two.")
        if set(self.shares) - {"words"} and not self.like:
            raise UserError("a decoder that shares layers says with which segment of the model: set `like`.")

    def to_dict(self) -> dict[str, Any]:
        pairs = self.segments.items()  # type: ignore[union-attr]
        plain = [[name, [{"name": k.name, "options": dict(k.options)} for k in kinds]] for name, kinds in pairs]
        words = None if self.words is None else self.words.to_dict()  # type: ignore[union-attr]
        return {**vars(self), "segments": plain, "shares": list(self.shares), "words": words}

    def reads(self, text: Embedder) -> Words:
        """The words it writes. Raises UserError when the model's text part has no table of words to lend."""
        if self.words is None and not isinstance(text, Words):
            raise UserError(f"the text part is a {text.name!r}, so the decoder needs words of its own: "
                            "Decoder(..., words=Words(width, vocabulary=...)).")  # fmt: skip
        return cast(Words, text if self.words is None else self.words)


class Memory:
    """Keys and values of earlier steps. transformers keeps and reorders them; here is who writes where."""

    def __init__(self, cache: EncoderDecoderCache, places: dict[int, int]):
        self.cache, self.places = cache, places  # places: id of an attention -> number of its layer

    def written(self, attend: Attend, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of all words so far: grows by those of `states`."""
        return self.cache.self_attention_cache.update(*attend.keys(states), self.places[id(attend)])

    def context(self, attend: Attend, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of the context: the same in every step, computed in the first."""
        n, cache = self.places[id(attend)], self.cache.cross_attention_cache
        if not self.cache.is_updated.get(n):
            self.cache.is_updated[n] = True
            return cache.update(*attend.keys(states), n)
        return cache.layers[n].keys, cache.layers[n].values  # type: ignore[return-value,union-attr]


class Recalling(Visibility):
    """A visibility in which whatever words read is remembered. Its blocks `tt` and `ti` have masks.

    `whole` (B, Q, K), in steps after the first: who may be seen in layers where words and cells are one sequence, in
    the order in which they came: the first step's words, the cells, later words.
    """

    memory: Memory
    whole: Tensor | None = None

    def sight(self, block: str) -> Sight | None:
        kept = {"tt": Memory.written, "ti": Memory.context}.get(block)  # what cells read is read once
        return self._kept(super().sight(block), kept)

    def joint(self, words: int, cells: int) -> Sight | None:
        seen = super().joint(words, cells) if self.whole is None else sight(self.whole)
        return self._kept(seen, Memory.written)

    def _kept(self, seen: Sight | None, kept: Callable | None) -> Sight | None:
        return seen if seen is None or kept is None else seen._replace(memory=partial(kept, self.memory))


class Beside(nn.Module):
    """Both streams as one sequence, words first. Cells of another width than the words' are brought to it."""

    def __init__(self, text: Width, image: Width):
        super().__init__()
        same = text.size == image.size
        self.project: nn.Module = nn.Identity() if same else nn.Linear(image.size, text.size)

    def forward(self, text: Tensor | None, text_mask: Tensor | None, image: Tensor | None,
                image_mask: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """States (B, T, D), (B, I, C), masks (B, T), (B, I), None = all real -> (B, T+I, D), (B, T+I) bool. One of the
        streams may be absent."""
        parts = [(text, text_mask)] if text is not None else []
        parts += [(self.project(image), image_mask)] if image is not None else []
        masks = [torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if m is None else m.bool()
                 for x, m in parts]  # fmt: skip
        return torch.cat([x for x, _ in parts], 1), torch.cat(masks, 1)


class TextDecoder(PreTrainedModel, GenerationMixin):
    """Words (B, T) and context (B, K, C) -> logits (B, T, V). `generate` is transformers' own.

    A text must not be padded on the left; padding on the right is never seen, since a word sees only earlier ones.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, spec: Decoder, words: Words, context: Width, lender: nn.Module | None = None,
                 image: Width | None = None):  # fmt: skip
        """`context`: the width of what is read, of the words' stream where both are; `image`: then the other one's.
        `lender`: the model whose parts are shared."""
        ids = {"bos_token_id": spec.start, "eos_token_id": spec.end, "pad_token_id": words.pad}
        config = PreTrainedConfig.from_dict({**ids, "is_decoder": True, "vocab_size": words.vocabulary})
        super().__init__(config)
        self.schedule = Schedule(dict(spec.segments), words.width, context)
        if spec.context == "both":
            self.beside = Beside(context, image or context)
        for layer in self.schedule.layers():
            if not isinstance(layer, Read | Text):
                raise UserError(f"a decoder is made of read and text layers, got {layer.kind!r}.")
        self.head = Tied(words.width.size, 0, words.vocabulary, eps=words.width.eps, activation=words.width.activation)
        if "words" in spec.shares:
            _borrow(self, "words", lender.text)  # type: ignore[union-attr,arg-type]
        else:
            self.words = words.build()
        if parts := [part for part in spec.shares if part != "words"]:
            lenders = getattr(lender.schedule, spec.like)  # type: ignore[union-attr]
            if len(lenders) != len(self.schedule.layers()):
                raise UserError(f"a decoder of {len(self.schedule.layers())} layers cannot share with the "
                                f"{len(lenders)} of {spec.like!r}.")  # fmt: skip
            for layer, other in zip(self.schedule.layers(), lenders):
                for part in parts:
                    _borrow(layer, part, getattr(other, part))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        *,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        first: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """`context_mask` (B, K), 1 = may be read. With `past_key_values`, `input_ids` are the words that are new.
        `first` (B,): the position of each text's first word, where it goes on from a prefix; None: 0."""
        text = self.states(input_ids, context, context_mask, past_key_values, first)
        return CausalLMOutputWithPast(logits=self.says(text), past_key_values=past_key_values)  # type: ignore[arg-type]

    def states(self, input_ids: Tensor, context: Tensor, context_mask: Tensor | None = None,
               past_key_values: EncoderDecoderCache | None = None, first: Tensor | None = None) -> Tensor:  # fmt: skip
        """As `forward`, before the head: (B, T, D)."""
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        length, device = input_ids.shape[1], input_ids.device
        past = torch.ones(1, length, before + length, dtype=torch.bool, device=device).tril(before)
        if context_mask is None:
            context_mask = torch.ones(1, context.shape[1], dtype=torch.bool, device=device)
        see = Visibility(tt=past, ti=context_mask.bool().unsqueeze(1))
        if past_key_values is not None:
            see = Recalling(see.tt, see.ti)
            see.memory = Memory(past_key_values, self.places())
        words = self.words(input_ids, start=before if first is None else before + first.unsqueeze(1))  # (B, T, D)
        return cast(Tensor, self.schedule(Streams(words, context), see).text)

    def says(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.head(states, self.words.words.weight)  # type: ignore[union-attr]

    @torch.no_grad()
    def start(self, table: Tensor) -> None:
        """Words of its own start as those of a tower, (V, D), where the sizes agree."""
        if "words" in self._modules and self.words.words.weight.shape == table.shape:  # type: ignore[union-attr]
            self.words.words.weight.copy_(table)  # type: ignore[union-attr,operator]

    def places(self) -> dict[int, int]:
        """id of each attention, borrowed ones too -> number of its layer."""
        parts = ("attend", "attend_self", "attend_image")
        return {id(getattr(layer, part)): n for n, layer in enumerate(self.schedule.layers()) for part in parts
                if hasattr(layer, part)}  # fmt: skip

    def generate(self, *args: Any, use_cache: bool = True, **kwargs: Any) -> Any:
        """transformers' `generate`, given `context` and `context_mask`, with the memory this decoder needs."""
        if use_cache and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return super().generate(*args, use_cache=use_cache, **kwargs)  # type: ignore[misc]


def _borrow(borrower: nn.Module, name: str, part: nn.Module) -> None:
    """`borrower.name` is `part`, which stays registered where it lives alone: counted, saved and moved once."""
    borrower._modules.pop(name, None)
    borrower.__dict__[name] = part
