"""Texts written and answers ranked by a model with a decoder. Decoding is transformers'; beams are BLIP's release's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interlace.decoder import TextDecoder
from interlace.errors import UserError
from interlace.model import Half, VLModel, check_ids
from interlace.objectives.lm import read_for, text_losses, written
from interlace.objectives.prefix_lm import read_prefix, reads_both
from interlace.prefix_generation import PrefixWriter


def decoder_of(model: VLModel, context: str) -> TextDecoder:
    if model.decoder is None or model.config.writes.context != context:
        fix = {"image": "use blip_caption or blip.", "text": "use blip_vqa.", "both": "train it with prefix_lm."}
        raise UserError(f"this model has no decoder that reads the {context}: {fix[context]}")
    return model.decoder


@torch.no_grad()
def write(decoder: TextDecoder, context: Half, prompt: Tensor | None = None, beams: int = 3, max_length: int = 20,
          min_length: int = 5, **options: Any) -> Tensor:  # fmt: skip
    """Context (B, K, C) -> ids (B, L), prompt included, ended by [SEP] and then padded. `prompt` (P,) or (B, P) begins
    with the decoder's start; None: the start alone. Both lengths count the prompt. `options`: transformers' own, such
    as do_sample, top_p, repetition_penalty, use_cache."""
    ids = _prompts(prompt, decoder.config, context, decoder.config.vocab_size)
    if beams < 1:
        raise UserError(f"beams is how many texts are followed at once, at least 1; got {beams}.")
    if ids.shape[1] >= max_length and "max_new_tokens" not in options:
        raise UserError(f"the prompt has {ids.shape[1]} tokens, its start included, and the text at most {max_length}: "
                        "shorten the prompt or raise max_length.")  # fmt: skip
    if beams > 1 and not options.get("do_sample"):
        options["custom_generate"] = search_beams
    options = {"do_sample": False, "max_length": max_length, "min_length": min_length, "num_beams": beams, **options}
    return decoder.generate(input_ids=ids, context=context.states, context_mask=context.mask, **options)


def caption(model: VLModel, pixels: Tensor, prompt: Tensor | None = None, **options: Any) -> Tensor:
    """Pictures (B, 3, S, S) -> ids (B, L) of a caption each, see `describe`."""
    with torch.no_grad():
        image = model.half_image(pixels)
    return describe(model, image, prompt, **options)


@torch.no_grad()
def describe(model: VLModel, image: Half, prompt: Tensor | None = None, ends: tuple[int, int, int] | None = None,
             prompt_mask: Tensor | None = None, **options: Any) -> Tensor:  # fmt: skip
    """The image's half -> ids (B, L) of a caption each, see `write`: by the decoder that reads the image, by the one
    that reads the image and the prompt, or, without a decoder, by the model's own layers; then `ends` are the ids a
    text starts and ends with and is padded by. `prompt_mask` (B, P), 1 = a word: prompts of unequal lengths, padded on
    either side; those of one length are written together. Raises UserError for a model that does not write about
    pictures, and for prompts that are padded without a mask."""
    if prompt_mask is not None and prompt is not None:
        return _by_length(model, image, prompt, prompt_mask.bool(), ends, **options)
    if model.decoder is None:
        if ends is None:
            raise UserError("this model has no decoder: to write with its own layers, give `ends`, the ids of a text's "
                            "start, end and padding.")  # fmt: skip
        return write_on(PrefixWriter(model, *ends), image, prompt, **options)
    if reads_both(model):
        return write_after(model, image, prompt, **options)
    return write(decoder_of(model, "image"), image, prompt, **options)


@torch.no_grad()
def write_on(writer: PrefixWriter, image: Half, prompt: Tensor | None = None, beams: int = 3, max_length: int = 20,
             min_length: int = 5, **options: Any) -> Tensor:  # fmt: skip
    """As `write`, without a decoder; beams are transformers' own."""
    ids = _prompts(prompt, writer.config, image, writer.model.vocabulary)
    options = {"do_sample": False, "max_length": max_length, "min_length": min_length,
               "num_beams": 1 if options.get("do_sample") else beams, **options}  # fmt: skip
    return writer.generate(ids, None, image, **options)


def write_after(model: VLModel, image: Half, prompt: Tensor | None = None, max_length: int = 20, min_length: int = 5,
                **options: Any) -> Tensor:  # fmt: skip
    """As `write`, where the prompt is read with the image, and the decoder goes on from it."""
    decoder = decoder_of(model, "both")
    ids = _prompts(prompt, decoder.config, image, model.vocabulary)
    given = ids.shape[1]
    places = torch.full_like(ids[:, 0], given)
    context = read_prefix(model, ids, torch.ones_like(ids), places, image)
    out = write(decoder, context, None, max_length=max_length - given + 1, min_length=max(min_length - given + 1, 0),
                first=places, **options)  # fmt: skip
    ids = ids.repeat_interleave(len(out) // len(ids), 0)  # as many texts of each picture as were asked for
    return torch.cat([ids, out[:, 1:]], 1)


def _by_length(model: VLModel, image: Half, prompt: Tensor, real: Tensor, ends: tuple[int, int, int] | None,
               **options: Any) -> Tensor:  # fmt: skip
    """`describe` for prompts (B, P) of which `real` (B, P) are words, each as it is written alone -> ids (B, L)."""
    lengths = real.sum(1)
    texts: list[tuple[Tensor, Tensor]] = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        words = prompt[rows][real[rows]].view(len(rows), length)
        ids = describe(model, image.rows(rows), words, ends, **options)
        texts.append((rows, ids.view(len(rows), -1, ids.shape[1])))  # each picture may have several texts
    pad = model.decoder.config.pad_token_id if model.decoder is not None else ends[2]  # type: ignore[index]
    longest = max(ids.shape[2] for _, ids in texts)
    out = texts[0][1].new_full((len(prompt), texts[0][1].shape[1], longest), pad)
    for rows, ids in texts:
        out[rows, :, : ids.shape[2]] = ids
    return out.flatten(0, 1)


def _prompts(prompt: Tensor | None, config: Any, image: Half, words: int) -> Tensor:
    """(P,) or (B, P) or None, the start alone -> (B, P), of a model that knows so many words."""
    prompt = torch.tensor([config.bos_token_id]) if prompt is None else prompt
    if not prompt.numel():
        raise UserError(f"a prompt begins with the start of a text, the id {config.bos_token_id}; this one is empty.")
    if prompt.dim() > 1 and len(prompt) not in (1, len(image.states)):
        raise UserError(f"{len(prompt)} prompts and {len(image.states)} pictures: row n of one belongs to row n of the "
                        "other, so there must be as many, or one prompt for all.")  # fmt: skip
    check_ids(prompt, words)
    if config.pad_token_id not in (config.bos_token_id, config.eos_token_id) and (prompt == config.pad_token_id).any():
        raise UserError("a prompt has padding among its words: give `describe` a prompt_mask, or write those of one "
                        "length together.")  # fmt: skip
    return prompt.to(image.states.device).expand(len(image.states), -1)


def ask(model: VLModel, question: Tensor, mask: Tensor | None, pixels: Tensor) -> Half:
    """Questions (B, T), beginning with [ENC], that have seen their pictures: what the answers are written from. Raises
    UserError for another number of questions than of pictures."""
    if len(question) != len(pixels):
        raise UserError(f"{len(question)} questions and {len(pixels)} pictures: row n of one belongs to row n of the "
                        "other, so there must be as many.")  # fmt: skip
    return read_for(model, model.half_text(question, mask), model.half_image(pixels))


def answer(model: VLModel, asked: Half, beams: int = 3, max_length: int = 10, min_length: int = 1,
           **options: Any) -> Tensor:  # fmt: skip
    """Questions asked -> ids (B, L) of an answer each, the same whatever else is in the batch. The release reads the
    padding of shorter questions too: for its answers give `Half(asked.states, None)`."""
    return write(decoder_of(model, "text"), asked, None, beams, max_length, min_length, **options)


@torch.no_grad()
def rank_answers(model: VLModel, asked: Half, answers: Tensor, k: int = 128) -> tuple[Tensor, Tensor]:
    """Questions asked (B, T, D), a list of answers (N, A), [DEC] first, padded -> the `k` whose first word is likeliest
    (B, k), and the log-probability of each, smoothed as in training (B, k). BLIP, section 5.3, inference."""
    decoder = decoder_of(model, "text")
    if k > len(answers):
        raise UserError(f"k={k}, but the list has {len(answers)} answers: lower k.")
    rows, pad = len(asked.states), decoder.config.pad_token_id
    first = decoder(answers[:1, :1].expand(rows, 1), asked.states, asked.mask).logits[:, 0]  # (B, V)
    kept = F.softmax(first, 1)[:, answers[:, 1]].topk(k, 1).indices  # (B, k)
    ids = answers[kept.flatten()]  # (B*k, A)
    losses = text_losses(decoder(ids, asked.states, asked.mask).logits, written(ids, pad))
    return kept, -losses.view(rows, k)


# ------------------------------------------------------------------------------------- beams as in the release


class Finished:
    """A row's best ended texts, at most `beams`."""

    def __init__(self, beams: int, penalty: float, early: bool):
        self.beams, self.penalty, self.early = beams, penalty, early
        self.texts: list[tuple[float, Tensor]] = []

    def add(self, ids: Tensor, total: float) -> None:
        score = total / len(ids) ** self.penalty
        if len(self.texts) < self.beams or score > min(s for s, _ in self.texts):
            self.texts.append((score, ids))
        if len(self.texts) > self.beams:
            self.texts.pop(min(range(len(self.texts)), key=lambda n: self.texts[n][0]))

    def closed(self, best: float, length: int) -> bool:
        """No running text can enter any more, were it to end now with the best total."""
        if len(self.texts) < self.beams:
            return False
        return self.early or min(s for s, _ in self.texts) >= best / length**self.penalty


def search_beams(decoder: TextDecoder, input_ids: Tensor, logits_processor, stopping_criteria, generation_config,
                 synced_gpus: bool = False, **state: Any) -> Tensor:  # fmt: skip
    """Beam search whose scores are totals divided by the whole length, prompt included, [SEP] excluded, and which looks
    at 2 * beams continuations a step: the rule of transformers 4.15, by which BLIP's captions were chosen. Newer
    versions divide by what was generated alone and choose other captions. For `generate(custom_generate=...)`, whose
    cache and processors it uses. Ids (B * beams, P), row by row -> (B * num_return_sequences, L), the best first.
    """
    beams, end, pad = generation_config.num_beams, decoder.config.eos_token_id, decoder.config.pad_token_id
    rows, cached = len(input_ids) // beams, bool(state.get("use_cache"))
    for name in ("context", "context_mask"):  # transformers repeated what is read for each beam; once is enough
        if state.get(name) is not None:
            state[name] = state[name][::beams]
    early = generation_config.early_stopping is True
    ended = [Finished(beams, generation_config.length_penalty, early) for _ in range(rows)]
    done = [False] * rows
    totals = torch.full((rows, beams), -1e9, device=input_ids.device)
    totals[:, 0] = 0  # all beams begin alike: only the first may go on
    step = None  # the first forward sees the whole prompt, later ones the new word
    while True:
        inputs = decoder.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state)  # type: ignore
        step = 1 if cached else None
        scores = F.log_softmax(decoder(**inputs).logits[:, -1].float(), -1)
        scores = logits_processor(input_ids, scores)  # (B * beams, V)
        words = scores.shape[-1]
        best, place = (scores.view(rows, beams, words) + totals[..., None]).flatten(1).topk(2 * beams, 1)
        chosen, word = torch.zeros_like(totals, dtype=torch.long), torch.full_like(totals, pad, dtype=torch.long)
        totals = torch.zeros_like(totals)
        for row in range(rows):
            if done[row]:
                continue  # stays, padded, until all are done
            going = 0
            for rank, (total, at) in enumerate(zip(best[row].tolist(), place[row].tolist())):
                beam, new = row * beams + at // words, at % words
                if new == end:
                    if rank < beams:  # an end among the worse half is no candidate
                        ended[row].add(input_ids[beam], total)
                elif going < beams:
                    chosen[row, going], word[row, going], totals[row, going] = beam, new, total
                    going += 1
            done[row] = ended[row].closed(float(best[row, 0]), input_ids.shape[1])
        chosen = chosen.flatten()
        input_ids = torch.cat([input_ids[chosen], word.view(-1, 1)], 1)
        if cached:
            state["past_key_values"].self_attention_cache.reorder_cache(chosen)  # what is read is a row's, not a beam's
        if all(done) or bool(torch.as_tensor(stopping_criteria(input_ids, None)).all()):
            break
    texts, each = [], generation_config.num_return_sequences or 1
    for row in range(rows):
        if not done[row]:
            for beam in range(beams):
                ended[row].add(input_ids[row * beams + beam], float(totals[row, beam]))
        best_last = sorted(ended[row].texts, key=lambda text: text[0])
        texts += [text for _, text in best_last[::-1][:each]]
    longest = min(max(map(len, texts)) + 1, generation_config.max_length)
    out = input_ids.new_full((len(texts), longest), pad)
    for row, text in enumerate(texts):
        out[row, : len(text)] = text
        if len(text) < longest:
            out[row, len(text)] = end
    return out
