"""ViLBERT (Lu et al. 2019, arXiv:1908.02265), figure 1, and 12-in-1 (Lu et al. 2020, arXiv:1912.02315), figure 2.

The text runs some layers alone, since a region's feature comes from a deep network already and a word's does not; then
each stream reads the other and digests what it read, several times. Of the release
(github.com/facebookresearch/vilbert-multi-task):
- the regions' first layer of their own comes after the first co-attention, which reads their embeddings;
- the pooled vectors are multiplied, and one linear says 0 = match, 1 = not, the other way round than elsewhere: its
  weights stay as they are, and the head turns what they say round (`flipped`), so that 1 = match here too;
- `biOutput.q_dense1` and `q_dense2`, 11M numbers at base size, take part in nothing: dropped;
- a task token has neither position nor type; the words after it are counted as if it were not there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from interlace.config import VLConfig
from interlace.embed.regions import ViLBERTRegions
from interlace.embed.task_words import TaskWords
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.heads import HEADS
from interlace.layers import BOTH, IMAGE, TEXT, Width, co
from interlace.schedule import Segments
from interlace.systems import BERT_WORDS, Parts, bert_start
from interlace.weights import bert_layer


class Product(nn.Module):
    """The two pooled vectors multiplied, then one linear. `size`: of the pooled vectors; 0 means the image's.
    `flipped`: the linear counts its classes from the other end."""

    def __init__(self, text: int, image: int, labels: int, size: int = 0, flipped: bool = False,
                 dropout: float = 0.1):  # fmt: skip
        super().__init__()
        self.dropout, self.out, self.flipped = nn.Dropout(dropout), nn.Linear(size or image, labels), flipped

    def forward(self, text: Tensor, image: Tensor) -> Tensor:  # (B, P), (B, P) -> (B, labels)
        said = self.out(self.dropout(text * image))
        return said.flip(-1) if self.flipped else said


class ProductAnswers(nn.Module):
    """The same, then a hidden layer twice as wide. `pictures` 2: the rows come in pairs of one text with two pictures,
    and each pair is one answer (NLVR2)."""

    def __init__(self, text: int, image: int, labels: int, size: int = 0, pictures: int = 1, dropout: float = 0.1):
        super().__init__()
        size, self.pictures = size or image, pictures
        self.dropout, self.activation = nn.Dropout(dropout), nn.GELU()
        self.dense = nn.Linear(pictures * size, 2 * size)
        self.norm, self.out = nn.LayerNorm(2 * size, eps=1e-12), nn.Linear(2 * size, labels)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:  # (B, P), (B, P) -> (B / pictures, labels)
        pair = self.dropout(text * image).reshape(-1, self.dense.in_features)
        return self.out(self.norm(self.activation(self.dense(pair))))


HEADS["product"] = Product
HEADS["product_answers"] = ProductAnswers


def vilbert(text: Words | None = None, image: ViLBERTRegions | None = None, segments: Segments | None = None,
            connections: int = 6, classes: int = 1601, **changes: Any) -> VLConfig:  # fmt: skip
    """Base. `connections`: co-attentions, of 2, 4, 6 and 8 in the paper's table 3. `classes`: of the detector, with the
    background. The first region is the whole picture: the mean of the features, the box 0, 0, 1, 1, 1."""
    text = text or Words(Width(768, heads=12), pool="relu", pool_size=1024)
    image = image or ViLBERTRegions(Width(1024, heads=8, ffn=1024), pool="relu", pool_size=1024)
    pooled = {"size": image.pool_size}
    crossing = [co(inner=1024, heads=8), BOTH] * connections
    return VLConfig(**{
        "text": text,
        "image": image,
        "segments": segments or {"text": [TEXT] * (12 - connections), "cross": crossing},
        "heads": {
            "mlm": {"kind": "tied", "labels": text.vocabulary},
            "mrc": {"kind": "transformed", "labels": classes, "stream": "image"},
            "match": {"kind": "product", "labels": 2, "flipped": True, **pooled},
        },
        **changes,
    })  # fmt: skip


def twelve_in_one(text: TaskWords | None = None, vqa: int = 3129, gqa: int = 1533, **changes: Any) -> VLConfig:
    """One model for twelve tasks: a token says which, and every kind of answer has a head."""
    text = text or TaskWords(Width(768, heads=12), pool="relu", pool_size=1024)
    config = vilbert(text, **changes)
    pooled = {"size": config.image.pool_size}
    config.heads |= {
        "answers": {"kind": "product_answers", "labels": vqa, **pooled},  # VQA, Visual Genome QA
        "answers_gqa": {"kind": "product_answers", "labels": gqa, **pooled},
        "rank": {"kind": "product", "labels": 1, **pooled},  # retrieval, VCR
        "nlvr2": {"kind": "product_answers", "labels": 2, "pictures": 2, **pooled},
        "entail": {"kind": "product", "labels": 3, **pooled},  # SNLI-VE, GuessWhat
        "refer": {"kind": "linear", "labels": 1, "stream": "image", "dropout": 0.1},  # which region: RefCOCO, pointing
        "refer_word": {"kind": "linear", "labels": 1, "dropout": 0.1},  # in the release, but no task reads it
    }
    return config


def tiny(**changes: Any) -> VLConfig:
    words = Words(Width(32, heads=4), pool="relu", pool_size=48, vocabulary=99, positions=24)
    regions = ViLBERTRegions(Width(48, heads=4, ffn=48), pool="relu", pool_size=48, features=20)
    segments = {"text": [TEXT] * 2, "cross": [co(inner=48, heads=2), BOTH] * 2}
    return vilbert(**{"text": words, "image": regions, "segments": segments, "classes": 11, **changes})


def small(parts: Parts) -> VLConfig:
    """At the size of the parts; grid cells stand for regions, after the whole picture. Half of the layers cross."""
    width, crossing = parts.width(), max(1, parts.layers // 2)
    pooled: dict[str, Any] = {"pool": "relu", "pool_size": width.size}
    segments = {"text": [TEXT] * (parts.layers - crossing), "cross": [co(), BOTH] * crossing}
    labels = {"mlm": {"kind": "tied", "labels": parts.vocabulary}, "match": {"kind": "product", "labels": 2},
              "mrc": {"kind": "transformed", "labels": parts.classes, "stream": "image"}}  # fmt: skip
    return vilbert(text=parts.words(**pooled), image=parts.grid(ViLBERTRegions, whole=True, **pooled),  # type: ignore
                   segments=segments, heads=labels)  # fmt: skip


def full(parts: Parts) -> VLConfig:
    """At the paper's size, with the parts' words and regions."""
    pooled = {"pool": "relu", "pool_size": 1024}
    labels = {"mlm": {"kind": "tied", "labels": parts.vocabulary},
              "match": {"kind": "product", "labels": 2, "size": 1024},
              "mrc": {"kind": "transformed", "labels": parts.classes, "stream": "image"}}  # fmt: skip
    image = parts.grid(ViLBERTRegions, whole=True, width=Width(1024, heads=8, ffn=1024), **pooled)
    return vilbert(text=parts.words(width=Width(768, heads=12), **pooled), image=image, heads=labels)  # type: ignore


def start(config: VLConfig) -> dict[str, Any]:
    """The lines by which BERT starts its words' stream, as in section 3.2."""
    alone = len(config.segments["text"])
    return {**BERT_WORDS, **bert_start("schedule.text.{n}"), **bert_start("schedule.cross.{2n+1}.text", alone)}


# Section 3.2 of ViLBERT: all summed in one forward. A mismatched pair scores words and regions too in the first paper,
# the alignment alone in 12-in-1. Of hidden regions 90% become zero.
PRETRAIN: list[dict[str, Any]] = [
    {"mlm": {"mask": 0.15, "at_least_one": False},
     "mrc_kl": {"mask": 0.15, "at_least_one": False, "kept": 0.1, "sum_classes": True},
     "itm": {"negatives": "swap", "rate": 0.5}},
]  # fmt: skip


def from_release(given: dict[str, Any], tasks: int = 0, **changes: Any) -> VLConfig:
    """The model of a release's configuration file (`config/bert_base_6layer_6conect.json`, read). `tasks`: rows of the
    task table; 0 means the model of pre-training. Raises UserError for a model that adds its pooled vectors."""
    if given.get("fusion_method", "mul") != "mul":
        raise UserError(f"ViLBERT multiplies the pooled vectors here; weights trained with another fusion_method, "
                        f"{given['fusion_method']!r}, would answer wrongly: take others.")  # fmt: skip
    pooled = {"pool": "relu", "pool_size": given["bi_hidden_size"]}
    width = Width(given["hidden_size"], given["num_attention_heads"], given["intermediate_size"],
                  dropout=given["hidden_dropout_prob"], attention_dropout=given["attention_probs_dropout_prob"],
                  activation=given["hidden_act"])  # fmt: skip
    wide = Width(given["v_hidden_size"], given["v_num_attention_heads"], given["v_intermediate_size"],
                 dropout=given["v_hidden_dropout_prob"], attention_dropout=given["v_attention_probs_dropout_prob"],
                 activation=given["v_hidden_act"])  # fmt: skip
    words = {"vocabulary": given["vocab_size"], "positions": given["max_position_embeddings"],
             "types": given["type_vocab_size"]}  # fmt: skip
    rest = {"image": ViLBERTRegions(wide, **pooled, features=given["v_feature_size"]), "segments": _meeting(given),
            "classes": given["v_target_size"], **changes}  # fmt: skip
    if tasks:
        return twelve_in_one(TaskWords(width, **pooled, **words, tasks=tasks), **rest)
    return vilbert(Words(width, **pooled, **words), **rest)


def _meeting(given: dict[str, Any]) -> Segments:
    # co-attention i stands before text layer t_biattention_id[i] and image layer v_biattention_id[i]; what is left of
    # either stream comes after the last one
    crossing = co(inner=given["bi_hidden_size"], heads=given["bi_num_attention_heads"])
    segments: Segments = {"text": [], "cross": []}
    ids = given["t_biattention_id"], given["v_biattention_id"]
    ends = zip([*ids[0], given["num_hidden_layers"]], [*ids[1], given["v_num_hidden_layers"]])
    text = image = 0
    for n, (text_end, image_end) in enumerate(ends):
        both = min(text_end - text, image_end - image)
        own = [BOTH] * both + [TEXT] * (text_end - text - both) + [IMAGE] * (image_end - image - both)
        segments["cross" if n else "text"] += own
        if n < len(ids[0]):
            segments["cross"].append(crossing)
        text, image = text_end, image_end
    return segments


def _co(theirs: str, ours: str) -> dict[str, str | None]:
    """A co-attention. In the release 1 is the image and 2 the text; who asks is in the query's and the output's names,
    who is read in the key's and the value's."""
    lines: dict[str, str | None] = {f"{theirs}.biOutput.q_dense1": None, f"{theirs}.biOutput.q_dense2": None}
    for stream, letter, asks, read in (("image", "v", 1, 2), ("text", "t", 2, 1)):
        lines |= {
            f"{theirs}.biattention.query{asks}": f"{ours}.{stream}_attend.query",
            f"{theirs}.biattention.key{read}": f"{ours}.{stream}_attend.key",
            f"{theirs}.biattention.value{read}": f"{ours}.{stream}_attend.value",
            f"{theirs}.biOutput.dense{asks}": f"{ours}.{stream}_attend.out",
            f"{theirs}.biOutput.LayerNorm{asks}": f"{ours}.{stream}_attend.norm",
            f"{theirs}.{letter}_intermediate.dense": f"{ours}.{stream}_ffn.up",
            f"{theirs}.{letter}_output.dense": f"{ours}.{stream}_ffn.down",
            f"{theirs}.{letter}_output.LayerNorm": f"{ours}.{stream}_ffn.norm",
        }
    return lines


def _answers(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.logit_fc.0": f"heads.{ours}.dense", f"{theirs}.logit_fc.2": f"heads.{ours}.norm",
            f"{theirs}.logit_fc.3": f"heads.{ours}.out"}  # fmt: skip


_ENDS = {
    "bert.embeddings.word_embeddings": "text.words",
    "bert.embeddings.position_embeddings": "text.positions",
    "bert.embeddings.token_type_embeddings": "text.types",
    "bert.embeddings.task_embeddings": "text.tasks",
    "bert.embeddings.LayerNorm": "text.norm",
    "bert.v_embeddings.image_embeddings": "image.features",
    "bert.v_embeddings.image_location_embeddings": "image.boxes",
    "bert.v_embeddings.LayerNorm": "image.norm",
    "bert.t_pooler.dense": "poolers.text.dense",
    "bert.v_pooler.dense": "poolers.image.dense",
    "cls.predictions.transform.dense": "heads.mlm.dense",
    "cls.predictions.transform.LayerNorm": "heads.mlm.norm",
    "cls.predictions.decoder.weight": "text.words.weight",  # tied
    "cls.predictions.bias": "heads.mlm.bias",
    "cls.imagePredictions.transform.dense": "heads.mrc.dense",
    "cls.imagePredictions.transform.LayerNorm": "heads.mrc.norm",
    "cls.imagePredictions.decoder": "heads.mrc.out",
    "cls.bi_seq_relationship": "heads.match.out",
    **_answers("vil_prediction", "answers"),
    **_answers("vil_prediction_gqa", "answers_gqa"),
    **_answers("vil_binary_prediction", "nlvr2"),
    "vil_logit": "heads.rank.out",
    "vil_tri_prediction": "heads.entail.out",
    "vision_logit": "heads.refer.out",
    "linguisic_logit": "heads.refer_word.out",
}


def keys(segments: Segments) -> dict[str, str | None]:
    """The release counts layers of one sort; ours stand where they run."""
    table: dict[str, str | None] = dict(_ENDS)
    count: Counter[str] = Counter()
    sorts = {"text": {"layer": ""}, "image": {"v_layer": ""}, "both": {"layer": ".text", "v_layer": ".image"},
             "co": {"c_layer": ""}}  # fmt: skip
    for name, kinds in segments.items():
        for n, kind in enumerate(kinds):
            for sort, part in sorts[kind.name].items():
                lines = _co if sort == "c_layer" else bert_layer
                table |= lines(f"bert.encoder.{sort}.{count[sort]}", f"schedule.{name}.{n}{part}")
                count[sort] += 1
    return table


KEYS = keys(vilbert().segments)  # of the base size; `keys(config.segments)` for others
