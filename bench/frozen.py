"""What a source gives without any training: frozen towers and closed forms. The floor a trained run has to leave.

    python -m bench.frozen furniture food --split test --out docs/bench/frozen.json

text <-> image   one linear map from the frozen picture tower to the frozen text tower: ridge, strength by folds; and
                 two maps, into what both agree on: canonical correlations, ridges and power by folds
image -> image   the frozen picture features themselves, by category
answers          the training majority, the blind majority for the same question, and the nearest training pictures'

The figures have the form of `interlace eval`'s, so the two stand side by side. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.common import keep, machine, parser, show
from interlace import towers
from interlace.canonical import canonical
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.processor import Processor
from interlace.data.rows import Pair, Question, Source
from interlace.data.sources import open_source
from interlace.evaluate import by_category, two_way
from interlace.held import scored
from interlace.tasks.baselines import nearest_neighbour_answers, question_only_prior, ridge_alignment
from interlace.tasks.metrics import Cosine, chance_vqa, listed_accuracy, unit

RIDGES = [(image, text) for image in (0.03, 0.1, 0.3, 1.0, 3.0) for text in (0.03, 0.1, 0.3, 1.0)]
COLUMNS = ["measure", "score", "95% interval", "chance", "queries"]


class Frozen:
    """Two towers, mean-pooled, nothing learned."""

    def __init__(self, image: str, text: str, size: int, fit: str):
        self.image, self.text = towers.load_tower(image, "image"), towers.load_tower(text, "text")
        self.processor = Processor(towers.load_tokenizer(text), size, fit=fit, max_length=128)
        spec = towers.pixel_spec(image)
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (spec.mean, spec.std))

    @torch.inference_mode()
    def pictures(self, pictures: list[Any]) -> np.ndarray:
        """-> (B, Di): the mean over the cells of the last feature map."""
        pixels = (self.processor.pictures(pictures).float() / 255 - self.mean) / self.std  # (B, 3, S, S)
        hidden = self.image.model(pixel_values=pixels).last_hidden_state
        return towers.grid_tokens(hidden, self.image.extras.prefix).mean(1).numpy()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """-> (B, Dt): the mean over the tokens."""
        ids, mask = self.processor.texts(texts)
        hidden = self.text.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, Dt)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return ((hidden * weights).sum(1) / weights.sum(1)).numpy()


def encode(frozen: Frozen, source: Source, split: str) -> tuple[list[Pair], np.ndarray, np.ndarray]:
    """The readable pairs of a split, pictures (N, Di) and captions (N, Dt)."""

    def readable() -> Iterator[tuple[Pair, Any]]:
        for row in tqdm(source.indices(split), desc=f"{source.name} {split}", unit="picture", leave=False):
            pair = source.pair(int(row))
            try:
                yield pair, open_picture(pair.picture, size_hint=frozen.processor.size)
            except BadPicture:
                continue

    pairs, pictures, texts, stream = [], [], [], readable()
    while some := list(islice(stream, 32)):
        pairs += [pair for pair, _ in some]
        pictures.append(frozen.pictures([picture for _, picture in some]))
        texts.append(frozen.texts([pair.caption for pair, _ in some]))
    return pairs, np.concatenate(pictures), np.concatenate(texts)


def measure(frozen: Frozen, source: Source, split: str) -> dict[str, Any]:
    """The figures of one source, learned on its train split, scored on `split`."""
    train, train_images, train_texts = encode(frozen, source, "train")
    test, images, texts = encode(frozen, source, split)
    out: dict[str, Any] = {"source": source.name, "split": split, "rows": len(test), "train_rows": len(train)}
    told, asked = ([i for i, p in enumerate(pairs) if p.caption.strip()] for pairs in (train, test))
    if len(asked) > 1 and len(told) > 1:
        ridge = ridge_alignment(
            train_images[told], train_texts[told], images[asked], texts[asked], groups=[train[i].group for i in told]
        )
        out["retrieval"] = two_way(ridge.similarities, [test[i].group for i in asked])
        out["retrieval"]["lambda"] = ridge.chosen
        known, said = unit(train_images[told]), unit(train_texts[told])
        both = canonical(known, said, [train[i].group for i in told], folds=5, ridges=RIDGES, powers=(1, 2, 4))
        mapped = (unit(images[asked]) - known.mean(0)) @ both.image, (unit(texts[asked]) - said.mean(0)) @ both.text
        out["canonical"] = two_way(np.asarray(Cosine(mapped[1], mapped[0])), [test[i].group for i in asked])
        out["canonical"]["chosen"] = list(both.chosen)
    out["image_to_image"] = by_category(unit(images), test, source)
    if source.n_questions:
        out["vqa"] = answers(source, split, (train, train_images), (test, images))
    return out


def answers(
    source: Source, split: str, train: tuple[list[Pair], np.ndarray], test: tuple[list[Pair], np.ndarray]
) -> dict[str, Any]:
    """Accuracy of the three ways to answer without training, and by kind of question."""
    known, known_rows = about(source, "train", train[0])
    asked, asked_rows = about(source, split, test[0])
    kinds, right, groups = [q.kind for q in asked], [q.answers for q in asked], [q.group for q in asked]
    chance = chance_vqa([q.answers for q in known], [q.kind for q in known], right, kinds).majority_by_kind
    near = nearest_neighbour_answers(train[1], known, test[1], asked, train_rows=known_rows, test_rows=asked_rows)
    out: dict[str, Any] = {"neighbours": near.chosen}
    for name, said in (("question only", question_only_prior(known, asked)), ("nearest pictures", near.predictions)):
        score = listed_accuracy(said, right, kinds)
        out[name] = scored(score.per_question, groups, chance.overall)
        out[name]["by_kind"] = score.by_kind
    out["chance_by_kind"] = chance.by_kind
    return out


def about(source: Source, split: str, pairs: list[Pair]) -> tuple[list[Question], list[int]]:
    """The questions about these pairs, and each one's row among them."""
    place = {pair.id: i for i, pair in enumerate(pairs)}
    questions = [q for q in source.questions(split) if q.pair_id in place]
    return questions, [place[q.pair_id] for q in questions]


def rows_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for by, how in (("retrieval", ""), ("canonical", ", canonical correlations")):
        for way, name in (("t2i", "text to image"), ("i2t", "image to text")):
            for k, score in figures.get(by, {}).get(way, {}).items():
                if isinstance(score, dict):
                    found.append((f"{name} {k}{how}", score))
    found += [(f"image to image mAP by {name}", each["mAP"]) for name, each in figures["image_to_image"].items()]
    vqa = figures.get("vqa", {})
    found += [(f"answers: {name}", vqa[name]) for name in ("question only", "nearest pictures") if name in vqa]
    return [
        {
            "measure": f"{figures['source']}: {name}", "score": f"{100 * score['value']:.1f}",
            "95% interval": f"{100 * score['low']:.1f} to {100 * score['high']:.1f}",
            "chance": f"{100 * score['chance']:.1f}", "queries": score["queries"],
        }
        for name, score in found
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__)
    options.add_argument("sources", nargs="*", default=["furniture", "food"], help="anything `interlace train` takes")
    options.add_argument("--split", default="test", choices=["val", "test"])
    options.add_argument("--image", default="efficientnet-lite0")
    options.add_argument("--text", default="minilm")
    options.add_argument("--size", type=int, default=160, help="side of the picture in pixels, as recipes have it")
    options.add_argument("--fit", default="pad", choices=["pad", "squash", "crop"])
    given = options.parse_args(argv)
    frozen = Frozen(given.image, given.text, given.size, given.fit)
    figures = [measure(frozen, open_source(name), given.split) for name in given.sources]
    notes = [
        f"{given.image} at {given.size} pixels and {given.text}, frozen, mean-pooled; {given.split} split, percent",
        "intervals: cluster bootstrap by group",
    ]
    show("Without training", COLUMNS, [row for each in figures for row in rows_of(each)], notes)
    content = {"image": given.image, "text": given.text, "size": given.size, "fit": given.fit, "sources": figures}
    keep(given.out, {"machine": machine("torch", "transformers"), **content})
    return figures


if __name__ == "__main__":
    main()
