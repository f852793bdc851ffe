"""Writing without a decoder: the model's own layers, from left to right (PrefixLM in one stack).

The picture and the first words are the prefix: they see each other's words and are never changed by what is written, so
their keys and values are computed once, for all beams and all steps. Wang et al. 2021 (SimVLM, arXiv:2108.10904).
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from interlace.decoder import Memory, Recalling
from interlace.embed.stem import TextTower
from interlace.errors import UserError
from interlace.layers import Attend
from interlace.model import Half, VLModel
from interlace.objectives.mlm import word_logits
from interlace.objectives.prefix_lm import check_writes
from interlace.streams import Streams, Visibility, first_words, prefix


class PrefixCache(EncoderDecoderCache):
    """Keys and values of the prefix and of what was written after it: of words (and of cells, where a layer has both in
    one sequence) in `self_attention_cache`, of cells that words read in `cross_attention_cache`, and the tower's."""

    def __init__(self, real: Tensor, count: Tensor, image: Half | None, tower: DynamicCache):
        super().__init__(DynamicCache(), DynamicCache())
        self.tower = tower
        self.real, self.count = real, count  # (B, T) bool of the words so far; (B, 1), how many have a position
        self.first = real.shape[1]  # slots of the prefix; in joint layers the cells follow it
        self.cells: Tensor | None = None  # (B, I) bool
        self.nothing: Tensor | None = None  # (B, 0, D): an image stream of which all is known
        if image is not None:
            self.nothing = image.states[:, :0]
            self.cells = real_of(image)
        self.logits: Tensor | None = None  # (B, 1, V) after the prefix, until they are asked for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Words whose logits have been given away."""
        return 0 if self.logits is not None else self.real.shape[1]

    def _own(self, change: Any) -> None:
        for name in ("real", "count", "cells", "nothing", "logits"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value))

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.tower.reorder_cache(beam_idx)
        self._own(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.tower.batch_repeat_interleave(repeats)
        self._own(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.tower.batch_select_indices(indices)
        self._own(lambda x: x[indices])


def real_of(half: Half) -> Tensor:
    """(B, L) bool."""
    if half.mask is None:
        return torch.ones(half.states.shape[:2], dtype=torch.bool, device=half.states.device)
    return half.mask.bool()


class PrefixWriter(PreTrainedModel, GenerationMixin):
    """A model without a decoder that writes: words (B, T) and the image's half -> logits (B, T, V), as `prefix_lm`
    trains them. `generate` is transformers' own; the picture and the prompt are read once, whatever the beams.

    Texts are padded on the left. Raises UserError for a model that cannot write, see `check_writes`.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model: VLModel, start: int, end: int, pad: int = 0, head: str = "mlm"):
        """`start`, `end`, `pad`: ids a text begins and ends with and is filled up with."""
        check_writes(model, head)
        ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
        super().__init__(PreTrainedConfig.from_dict({**ids, "is_decoder": True}))
        self.model, self.head = model, head
        self.training = model.training
        attends = [part for part in model.schedule.modules() if isinstance(part, Attend)]
        self.places = {id(part): n for n, part in enumerate(attends)}
        takes = inspect.signature(model.text.tower.forward).parameters if isinstance(model.text, TextTower) else ()
        self.counts = "position_ids" in takes

    @property
    def longest(self) -> int:
        """Tokens a text may have."""
        text = self.model.text
        if isinstance(text, TextTower):
            return getattr(text.tower.config, "max_position_embeddings", None) or 1 << 30
        return text.positions.num_embeddings - text.first  # type: ignore[union-attr,operator,return-value]

    def words(self, ids: Tensor, real: Tensor, start: Tensor, cache: PrefixCache | None = None) -> Tensor:
        """(B, T) new words, all so far (B, S) bool, how many came before (B, 1), negative for padding -> (B, T, D)."""
        text = self.model.text
        if not isinstance(text, TextTower):
            return text(ids, None, start=start)
        given: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache.tower}
        if self.counts:
            given["position_ids"] = (torch.arange(ids.shape[1], device=ids.device) + start).clamp(min=0)
        return text.project(text.tower(input_ids=ids, attention_mask=real.long(), **given).last_hidden_state)

    def states(self, words: Tensor, image: Tensor | None, see: Visibility) -> Tensor:
        """Words (B, T, D), the image's half (B, I, C) -> the text stream at the end (B, T, D)."""
        schedule, alone = self.model.schedule, self.model._alone
        text = schedule.run(Streams(words, None), see, stop=alone).text
        return cast(Tensor, schedule.run(Streams(text, image), see, start=alone).text)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
        given: Tensor | None = None,
        past_key_values: PrefixCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """`image`, `image_mask`: the image's half. `given` (B,): slots of each row's prefix; None: all words are given.
        With `past_key_values`, which `read` makes, `input_ids` are the words that are new."""
        if past_key_values is not None:
            logits = self._go_on(input_ids, past_key_values)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]
        length = input_ids.shape[1]
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:  # words written since are real
            real[:, : attention_mask.shape[1]] = attention_mask.bool()
        given = torch.full_like(input_ids[:, 0], length) if given is None else given
        see = prefix(real, image_mask, first_words(given, length))
        text = self.states(self.words(input_ids, real, -padding(real)), image, see)
        return CausalLMOutputWithPast(logits=word_logits(self.model, text[:, -logits_to_keep:], self.head))

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, image: Half | None) -> PrefixCache:
        """The prefix: words (B, P), padded on the left, and the image's half. What is kept of it, for each row once."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        counted = getattr(self.model.text, "counted", None)  # tokens that have no position
        count = (real if counted is None else real & counted(input_ids)).sum(1, keepdim=True)
        tower = DynamicCache()
        if isinstance(self.model.text, TextTower):
            tower = DynamicCache(config=self.model.text.tower.config)
        kept = PrefixCache(real, count, image, tower)
        blocks = prefix(real, kept.cells, torch.ones_like(real))
        see = Recalling(blocks.tt, blocks.ti, blocks.it, blocks.ii)
        see.memory = Memory(kept, self.places)
        words = self.words(input_ids, real, -padding(real), kept)
        text = self.states(words, None if image is None else image.states, see)
        kept.logits = word_logits(self.model, text[:, -1:], self.head)
        return kept

    def _go_on(self, ids: Tensor, kept: PrefixCache) -> Tensor:
        if kept.logits is not None:  # the prefix has been read; only now is it known how many texts follow from it
            if (times := len(ids) // len(kept.logits)) > 1:
                kept.batch_repeat_interleave(times)
            logits, kept.logits = kept.logits, None
            return logits
        new, first = ids.shape[1], kept.first
        real = kept.real = torch.cat([kept.real, torch.ones_like(ids, dtype=torch.bool)], 1)
        past = torch.ones(new, real.shape[1], dtype=torch.bool, device=ids.device).tril(real.shape[1] - new)
        words = past & real.unsqueeze(1)  # (B, new, T)
        see = Recalling(tt=words)
        see.memory = Memory(kept, self.places)
        if kept.cells is not None:
            see.ti = kept.cells.unsqueeze(1)
            see.whole = torch.cat([words[..., :first], see.ti.expand(-1, new, -1), words[..., first:]], -1)
        embedded = self.words(ids, real, kept.count, kept)
        kept.count = kept.count + new
        return word_logits(self.model, self.states(embedded, kept.nothing, see), self.head)

    def generate(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, picture: Half | None = None,
        use_cache: bool = True, **options: Any,
    ) -> Any:  # fmt: skip
        """transformers' `generate` from prompts (B, P), mask (B, P), padded on either side, and the image's half ->
        ids (B, L), padding on the left. Raises UserError for a text longer than the positions."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        order = real.argsort(dim=1, stable=True)  # padding first
        ids, real = input_ids.gather(1, order), real.gather(1, order)
        total = options.get("max_length") or ids.shape[1] + (options.get("max_new_tokens") or 20)
        if total > self.longest:
            raise UserError(f"a text of {total} tokens, but the model has {self.longest} positions: lower max_length.")
        if use_cache:
            options["past_key_values"] = self.read(ids, real, picture)
        else:
            options["given"] = torch.full_like(ids[:, 0], ids.shape[1])
            if picture is not None:
                options["image"], options["image_mask"] = picture.states, real_of(picture)
        return super().generate(input_ids=ids, attention_mask=real, use_cache=use_cache, **options)  # type: ignore


def padding(real: Tensor) -> Tensor:
    """(B, T) bool -> (B, 1): how many slots stand before the first word."""
    return (~real).long().cumprod(1).sum(1, keepdim=True)
