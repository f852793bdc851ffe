"""What `bench.models` times: each published system that transformers has, with its weights, on one batch.

Of each, the ways to the same result on both sides, ours and theirs, as `Case`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from interlace import generate
from interlace.captioner import Ids, caption_model
from interlace.embed.regions import LXMERTRegions, Regions, VisualBERTRegions
from interlace.embed.words import Words
from interlace.layers import JOINT, Width
from interlace.model import VLModel, VLOutput
from interlace.objectives.itc import contrast
from interlace.objectives.lm import written
from interlace.objectives.mlm import word_logits
from interlace.presets import blip, clip, lxmert, vilt, visual_bert
from interlace.streams import POOLED, Asked
from interlace.weights import load_foreign

START, END, HIDDEN = 97, 3, -100  # ids of a written text; what is not scored


@dataclass
class Sizes:
    width: int = 768
    heads: int = 12
    layers: int = 4  # of each stack
    batch: int = 4
    words: int = 20
    regions: int = 36
    features: int = 2048
    pixels: int = 224  # side of a picture
    large: int = 384  # the same of ViLT and BLIP
    vocabulary: int = 30522
    answers: int = 3129
    written: int = 20  # words of a caption that is generated

    def patch(self, base: int) -> int:
        """Pixels of a patch: the release's, or what leaves a toy picture a few."""
        return min(base, self.pixels // 4)

    @property
    def bert(self) -> dict[str, Any]:
        """The names under which transformers' older configurations have them."""
        return {"hidden_size": self.width, "num_attention_heads": self.heads, "num_hidden_layers": self.layers,
                "intermediate_size": 4 * self.width}  # fmt: skip


TINY = Sizes(width=32, heads=4, layers=1, batch=2, words=8, regions=4, features=10, pixels=64, large=64,
             vocabulary=120, answers=7, written=6)  # fmt: skip


@dataclass
class Batch:
    """What all models read. Every second text is padded to the length of the others."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    labels: Tensor  # (B, T), one word in seven, -100 elsewhere
    answers: Tensor  # (B, A), scores
    features: Tensor  # (B, I, F)
    boxes: Tensor  # (B, I, 4)
    pixels: Tensor  # (B, 3, S, S)

    @classmethod
    def draw(cls, size: Sizes) -> Batch:
        g = torch.Generator().manual_seed(0)
        shape = size.batch, size.words
        ids = torch.randint(START + 2, size.vocabulary, shape, generator=g)
        ids[:, 0] = START
        mask = torch.ones(shape, dtype=torch.long)
        mask[1::2, size.words * 2 // 3 :] = 0
        ids[torch.arange(len(ids)), mask.sum(1) - 1] = END
        ids = ids * mask  # padded with 0
        hidden = torch.zeros(shape, dtype=torch.bool)
        hidden[:, 2 : int(mask.sum(1).min()) - 1 : 7] = True
        answers = torch.zeros(size.batch, size.answers)
        answers[torch.arange(size.batch), torch.randint(size.answers, (size.batch,), generator=g)] = 1
        regions = size.batch, size.regions
        corners = torch.rand(*regions, 2, 2, generator=g).sort(-2).values  # (left, top) before (right, bottom)
        return cls(ids, mask, ids.masked_fill(~hidden, HIDDEN), answers,
                   torch.randn(*regions, size.features, generator=g), corners.flatten(-2),
                   torch.randn(size.batch, 3, size.pixels, size.pixels, generator=g))  # fmt: skip

    @property
    def regions(self) -> Regions:
        return Regions(self.features, self.boxes)


@dataclass
class Case:
    """One line of the table: two ways to the same result, and how far the results are apart."""

    model: str
    task: str
    ours: Callable[[], Any]
    other: Callable[[], Any]
    differ: Callable[[], float]
    holds: tuple[Callable[[], Any], Callable[[], Any]]  # what memory is asked of
    rival: str = "transformers"


# ----------------------------------------------------------------------------------------------------- kinds of work
def forward(name: str, ours: Callable[[], Any], other: Callable[[], Any]) -> Case:
    """Each side gives its states, one tensor or several."""

    def quietly(side: Callable[[], Any]) -> Callable[[], tuple[Tensor, ...]]:
        @torch.inference_mode()
        def run() -> tuple[Tensor, ...]:
            out = side()
            return out if isinstance(out, tuple) else (out,)

        return run

    a, b = quietly(ours), quietly(other)
    return Case(name, "forward", a, b, lambda: max(apart(x, y) for x, y in zip(a(), b(), strict=True)), (a, b))


def train(
    name: str, task: str, ours: tuple[nn.Module, str, Callable[[], Tensor]],
    other: tuple[nn.Module, str, Callable[[], Tensor]], rival: str = "transformers",
) -> Case:  # fmt: skip
    """A side: its model, the name of the parameter whose gradients are compared, and the loss."""

    def differ() -> float:
        found = []
        for model, watched, loss in (ours, other):
            model.eval()  # dropout would draw other numbers on either side
            value = loss()
            value.backward()
            gradient = model.get_parameter(watched).grad
            assert gradient is not None
            found.append((value.detach(), gradient / gradient.abs().max()))
            model.zero_grad()
        return max(apart(x, y) for x, y in zip(*found))

    steps = step(ours[0], ours[2]), step(other[0], other[2])
    return Case(name, f"train, {task}", *steps, differ, (ours[2], other[2]), rival)


def step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)  # so slow that hardly a weight changes

    def run() -> None:
        if not model.training:
            model.train()
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def write(name: str, task: str, ours: Callable[[], Tensor], other: Callable[[], Tensor]) -> Case:
    """Each side gives ids (B, L)."""
    return Case(name, task, ours, other, lambda: apart(ours(), other()), (ours, other))


def apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        sys.exit(f"nothing was measured: ours gave {tuple(a.shape)}, the other {tuple(b.shape)}")
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------------------- models
def built(cls: type[hf.PreTrainedModel], config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    """Random weights, the fastest attention the class has, evaluation mode."""
    attention = "sdpa" if cls._supports_sdpa else "eager"
    return cls._from_config(config, attn_implementation=attention).eval()


def like(config: Any, theirs: nn.Module, keys: Any, **options: Any) -> VLModel:
    """Ours with their weights, evaluation mode."""
    model = VLModel(config).eval()
    load_foreign(model, theirs.state_dict(), keys, **options)
    return model


def fused(model: VLModel, batch: Batch, seen: Tensor | Regions, asked: Asked) -> VLOutput:
    """As objectives read a model: the last layer computes what is asked for."""
    return model.fuse(model.half_text(batch.ids, batch.mask), model.half_image(seen), asked=asked)


def judged(model: VLModel, head: str, batch: Batch, seen: Tensor | Regions) -> Tensor:
    """Logits of a head over the words' pooled vector."""
    return model.heads[head](fused(model, batch, seen, model.asked_by(head)).pooled_text)


def hidden_words(model: VLModel, batch: Batch, seen: Tensor | Regions) -> Tensor:
    """The loss of hidden words as `objectives.MLM` has it: logits, and states of the last layer, where a word is hidden
    and nowhere else."""
    asked = batch.labels != HIDDEN
    states = model.words_where(model.half_text(batch.ids, batch.mask), model.half_image(seen), asked)
    return F.cross_entropy(word_logits(model, states), batch.labels[asked])


def lxmert_cases(size: Sizes) -> Iterator[Case]:
    """Its layers in about the release's 9, 5 and 5: as many altogether as the other models have in a stack; then as
    many in each of its three stacks."""
    n = size.layers
    yield from lxmert_of(size, "LXMERT", (max(1, n // 2), max(1, n // 4), max(1, n // 4)))
    if n > 1:
        yield from lxmert_of(size, f"LXMERT, 3 x {n} layers", (n, n, n))


def lxmert_of(size: Sizes, name: str, layers: tuple[int, int, int]) -> Iterator[Case]:
    """`layers`: of language, of regions, and that cross."""
    batch = Batch.draw(size)
    language, alone, crossing = layers
    theirs = {"vocab_size": size.vocabulary, "hidden_size": size.width, "num_attention_heads": size.heads,
              "intermediate_size": 4 * size.width, "l_layers": language, "r_layers": alone, "x_layers": crossing,
              "visual_feat_dim": size.features, "num_qa_labels": size.answers, "task_obj_predict": False,
              "task_qa": False, "task_matched": False}  # fmt: skip
    width = Width(size.width, heads=size.heads)
    words = Words(width, pool="tanh", vocabulary=size.vocabulary)
    regions = LXMERTRegions(width, features=size.features)
    read = {"input_ids": batch.ids, "attention_mask": batch.mask, "visual_feats": batch.features,
            "visual_pos": batch.boxes}  # fmt: skip
    first = "encoder.visn_fc.visn_fc.weight"

    other: Any = built(hf.LxmertForQuestionAnswering, hf.LxmertConfig(**theirs))
    heads = {"answers": {"kind": "transformed", "labels": size.answers, "hidden": 2 * size.width}}
    ours = like(lxmert.lxmert(words, regions, layers, heads=heads), other, lxmert.HF_KEYS)

    def run(model: VLModel) -> Any:
        return model(batch.ids, batch.regions, batch.mask)

    def states(model: Any) -> tuple[Tensor, ...]:
        out = model.lxmert(**read)
        return out.language_output, out.vision_output, out.pooled_output

    def ours_states() -> tuple[Tensor, ...]:
        out = run(ours)
        return out.text, out.image, out.pooled_text

    yield forward(name, ours_states, lambda: states(other))
    right = batch.answers.argmax(1)
    yield train(
        name, "answers",
        (ours, "image.features.weight",
         lambda: F.cross_entropy(judged(ours, "answers", batch, batch.regions), right)),
        (other, f"lxmert.{first}", lambda: other(**read, labels=right).loss),
    )  # fmt: skip

    other2: Any = built(hf.LxmertForPreTraining, hf.LxmertConfig(**theirs))
    heads = {"mlm": {"kind": "tied", "labels": size.vocabulary}, "match": {"kind": "linear", "labels": 2}}
    ours2 = like(lxmert.lxmert(words, regions, layers, heads=heads), other2, lxmert.HF_KEYS)
    yield train(
        name, "hidden words",
        (ours2, "image.features.weight", lambda: hidden_words(ours2, batch, batch.regions)),
        (other2, f"lxmert.{first}", lambda: other2(**read, labels=batch.labels).loss),
    )  # fmt: skip


def visual_bert_cases(size: Sizes) -> Iterator[Case]:
    batch = Batch.draw(size)
    config = {**size.bert, "vocab_size": size.vocabulary, "visual_embedding_dim": size.features}
    width = Width(size.width, heads=size.heads)
    parts = {"text": Words(width, pool="tanh", vocabulary=size.vocabulary),
             "image": VisualBERTRegions(width, features=size.features),
             "segments": {"joint": [JOINT] * size.layers}}  # fmt: skip
    regions = Regions(batch.features, None)
    read = {"input_ids": batch.ids, "attention_mask": batch.mask, "visual_embeds": batch.features,
            "visual_attention_mask": torch.ones(batch.features.shape[:2], dtype=torch.long),
            "visual_token_type_ids": torch.zeros(batch.features.shape[:2], dtype=torch.long)}  # fmt: skip
    first = "image.features.weight", "visual_bert.embeddings.visual_projection.weight"

    def run(model: VLModel) -> Any:
        return model(batch.ids, regions, batch.mask)

    other: Any = built(hf.VisualBertForQuestionAnswering, hf.VisualBertConfig(**config, num_labels=size.answers))
    heads = {"answers": {"kind": "linear", "labels": size.answers, "dropout": 0.1}}
    ours = like(visual_bert.visual_bert(**parts, heads=heads), other, visual_bert.HF_KEYS,
                fresh=("poolers.text.dense",))  # fmt: skip

    def states() -> Tensor:
        out = run(ours)
        return torch.cat([out.text, out.image], 1)

    def answers() -> Tensor:
        asked = Asked(visual_bert.answer_place(batch.mask).unsqueeze(1), POOLED.image, pooled=())
        states = fused(ours, batch, regions, asked).text
        assert states is not None
        logits = ours.heads["answers"](states[:, 0])
        return F.kl_div(logits.log_softmax(-1), batch.answers, reduction="batchmean")

    yield forward("VisualBERT", states, lambda: other.visual_bert(**read).last_hidden_state)
    yield train("VisualBERT", "answers", (ours, first[0], answers),
                (other, first[1], lambda: other(**read, labels=batch.answers).loss))  # fmt: skip

    other2: Any = built(hf.VisualBertForPreTraining, hf.VisualBertConfig(**config))
    ours2 = like(visual_bert.visual_bert(**parts, heads=visual_bert.heads(size.vocabulary)), other2,
                 visual_bert.HF_KEYS)  # fmt: skip
    labels = F.pad(batch.labels, (0, size.regions), value=HIDDEN)  # transformers scores words and regions as one

    def everywhere() -> Tensor:
        out = run(ours2)
        logits = ours2.heads["mlm"](torch.cat([out.text, out.image], 1), ours2.text.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    hidden = ours2, first[0], lambda: hidden_words(ours2, batch, regions)
    yield train("VisualBERT", "hidden words", hidden,
                (other2, first[1], lambda: other2(**read, labels=labels).loss))  # fmt: skip
    yield train("VisualBERT", "hidden words", hidden, (ours2, first[0], everywhere), "ours, logits everywhere")


def vilt_cases(size: Sizes) -> Iterator[Case]:
    size = replace(size, pixels=size.large)
    batch, patch = Batch.draw(size), size.patch(32)
    config = {**size.bert, "vocab_size": size.vocabulary, "image_size": size.pixels, "patch_size": patch,
              "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-6, "max_image_length": -1}  # fmt: skip
    width = Width(size.width, heads=size.heads, norm="pre", eps=1e-6, attention_dropout=0.0)
    text, image = {"vocabulary": size.vocabulary, "eps": 1e-6}, {"size": size.pixels, "patch": patch}
    read = {"input_ids": batch.ids, "attention_mask": batch.mask, "pixel_values": batch.pixels}
    first = "image.project.weight", "vilt.embeddings.patch_embeddings.projection.weight"

    def like_it(other: nn.Module, heads: dict[str, Any]) -> VLModel:
        return like(vilt.vilt(width, size.layers, text, image, heads=heads), other, vilt.HF_KEYS)

    def run(model: VLModel) -> Any:
        return model(batch.ids, batch.pixels, batch.mask)

    other: Any = built(hf.ViltForQuestionAnswering, hf.ViltConfig(**config, num_labels=size.answers))
    ours = like_it(other, {"answers": vilt.answers(size.answers)})

    def answers() -> Tensor:
        logits = judged(ours, "answers", batch, batch.pixels)
        return F.binary_cross_entropy_with_logits(logits, batch.answers) * size.answers

    # the pooled vector, since transformers puts the patches in random order
    yield forward("ViLT", lambda: run(ours).pooled_text, lambda: other.vilt(**read).pooler_output)
    yield train("ViLT", "answers", (ours, first[0], answers),
                (other, first[1], lambda: other(**read, labels=batch.answers).loss))  # fmt: skip

    other2: Any = built(hf.ViltForMaskedLM, hf.ViltConfig(**config))
    ours2 = like_it(other2, {"mlm": vilt.words(size.vocabulary) | {"eps": 1e-6}})
    yield train("ViLT", "hidden words",
                (ours2, first[0], lambda: hidden_words(ours2, batch, batch.pixels)),
                (other2, first[1], lambda: other2(**read, labels=batch.labels).loss))  # fmt: skip


def blip_cases(size: Sizes) -> Iterator[Case]:
    size = replace(size, pixels=size.large, batch=max(2, size.batch // 2))  # 577 states a picture: half as many rows
    batch, patch = Batch.draw(size), size.patch(16)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    text = {**size.bert, **dropout, "vocab_size": size.vocabulary, "bos_token_id": START, "sep_token_id": END,
            "eos_token_id": END, "pad_token_id": 0, "projection_dim": 256, "encoder_hidden_size": size.width,
            "label_smoothing": 0.1}  # fmt: skip
    vision = {**size.bert, "image_size": size.pixels, "patch_size": patch, "layer_norm_eps": 1e-6}
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256)
    sizes = {"text": Width(size.width, heads=size.heads), "layers": (size.layers, size.layers), "patch": patch,
             "image": Width(size.width, heads=size.heads, norm="pre", eps=1e-6, dropout=0.0, attention_dropout=0.0),
             "pixels": size.pixels, "ends": (START, END), "words": {"vocabulary": size.vocabulary}}  # fmt: skip

    other: Any = built(hf.BlipForImageTextRetrieval, config)
    heads = {"contrast": blip.CONTRAST, "match": blip.MATCH}
    ours = like(blip.blip_retrieval(**sizes, heads=heads), other, blip.HF_KEYS, fresh=("heads.contrast.temperature",))

    def match() -> Tensor:
        return judged(ours, "match", batch, batch.pixels)

    yield forward("BLIP", match, lambda: other(batch.ids, batch.pixels, attention_mask=batch.mask).itm_score)

    writer: Any = built(hf.BlipForConditionalGeneration, config)
    mine: Any = like(blip.blip_caption(**sizes), writer, blip.HF_CAPTION_KEYS)

    def writing(task: str, beams: int) -> Case:
        options: dict[str, Any] = {"max_length": size.written, "min_length": size.written, "do_sample": False}
        return write("BLIP", f"write, {task}",
                     lambda: generate.caption(mine, batch.pixels, beams=beams, **options),
                     lambda: writer.generate(batch.pixels, num_beams=beams, **options))  # fmt: skip

    yield writing("greedy", 1)
    yield writing("beam 3", 3)
    labels = written(batch.ids)

    def captions() -> Tensor:  # as `objectives.LM`: no logits for padding, nor after the last word
        states = mine.decoder.states(batch.ids[:, :-1], mine.half_image(batch.pixels).states)
        asked, target = labels[:, 1:] != HIDDEN, labels[:, 1:]
        return F.cross_entropy(mine.decoder.says(states[asked]), target[asked], label_smoothing=0.1)

    def their_captions() -> Tensor:
        return writer(batch.pixels, batch.ids, attention_mask=batch.mask, labels=labels).loss

    yield train("BLIP", "captions", (mine, "image.project.weight", captions),
                (writer, "vision_model.embeddings.patch_embedding.weight", their_captions))  # fmt: skip


def clip_cases(size: Sizes) -> Iterator[Case]:
    batch, patch = Batch.draw(size), size.patch(32)
    text = {**size.bert, "vocab_size": size.vocabulary, "eos_token_id": END, "bos_token_id": START, "pad_token_id": 0}
    vision = {**size.bert, "image_size": size.pixels, "patch_size": patch}
    other: Any = built(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=vision))
    width = clip.width(size.width, size.heads)
    words = {"vocabulary": size.vocabulary, "eos": END}
    ours = like(clip.clip(width, width, (size.layers, size.layers), 512, patch, size.pixels, words), other,
                clip.HF_KEYS)  # fmt: skip
    read = {"input_ids": batch.ids, "attention_mask": batch.mask, "pixel_values": batch.pixels}
    each, real = torch.arange(size.batch), torch.ones(size.batch, dtype=torch.bool)

    def vectors() -> tuple[Tensor, Tensor]:
        return ours.encode_text(batch.ids, batch.mask), ours.encode_image(batch.pixels)

    def their_vectors() -> tuple[Tensor, Tensor]:
        out = other(**read)
        return out.text_embeds, out.image_embeds

    yield forward("CLIP", vectors, their_vectors)
    yield train("CLIP", "contrast",
                (ours, "image.project.weight", lambda: contrast(*vectors(), each, real, ours.contrast.scale)[0]),
                (other, "vision_model.embeddings.patch_embedding.weight",
                 lambda: other(**read, return_loss=True).loss))  # fmt: skip


def vision_encoder_decoder_cases(size: Sizes) -> Iterator[Case]:
    batch, name = Batch.draw(size), "ViT + BERT"
    vision = hf.ViTConfig(**size.bert, image_size=size.pixels, patch_size=size.patch(16))
    text = hf.BertConfig(**size.bert, vocab_size=size.vocabulary)
    ours: Any = caption_model(vision, text, Ids(START, 0, END))
    other: Any = built(hf.VisionEncoderDecoderModel, hf.VisionEncoderDecoderConfig(**ours.config.to_dict()))
    other.load_state_dict(ours.state_dict(), strict=False)  # theirs has a pooler that nothing reads
    other.generation_config = ours.generation_config
    labels = written(batch.ids)[:, 1:]  # both put the start in front

    def loss(model: Any) -> Tensor:
        return model(pixel_values=batch.pixels, labels=labels).loss

    def logits(model: Any) -> Tensor:
        return model(pixel_values=batch.pixels, decoder_input_ids=batch.ids).logits

    def texts(model: Any) -> Tensor:
        return model.generate(pixel_values=batch.pixels, max_length=size.written, min_length=size.written,
                              num_beams=1, do_sample=False)  # fmt: skip

    yield forward(name, lambda: logits(ours), lambda: logits(other))
    yield write(name, "write, greedy", lambda: texts(ours), lambda: texts(other))
    first = "encoder.embeddings.patch_embeddings.projection.weight"
    yield train(name, "captions", (ours, first, lambda: loss(ours)), (other, first, lambda: loss(other)))


MODELS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "lxmert": lxmert_cases, "visual_bert": visual_bert_cases, "vilt": vilt_cases, "blip": blip_cases,
    "clip": clip_cases, "vision_encoder_decoder": vision_encoder_decoder_cases,
}  # fmt: skip
