"""Every size of every preset has as many numbers as its release, or where there is none, as its figure says by hand.

Counted on the meta device: nothing is allocated. A tied table counts once.
"""

from itertools import pairwise

import pytest
import torch

from interlace.captioner import CaptionModel
from interlace.config import VLConfig
from interlace.model import VLModel
from interlace.presets import names, preset


def linear(inside, out):
    return inside * out + out


def attention(d, context=None):
    """Query, key, value, output, norm."""
    return 2 * linear(d, d) + 2 * linear(context or d, d) + 2 * d


def ffn(d):
    return linear(d, 4 * d) + linear(4 * d, d) + 2 * d


def block(d):
    return attention(d) + ffn(d)


def transform(d, out):
    """Linear, norm, then a table or a linear of `out`; a table that is tied costs its biases alone."""
    return linear(d, d) + 2 * d + out


def words(d, vocabulary, types=2):
    return (vocabulary + 512 + types + 2) * d


def vit(d, patch, pixels, layers):
    return linear(3 * patch**2, d) + d + ((pixels // patch) ** 2 + 1) * d + layers * block(d) + 2 * d


def uniter(d, layers):
    regions = linear(2048, d) + linear(7, d) + 3 * 2 * d + 2 * 2048
    heads = transform(d, 28996) + transform(d, 2048) + transform(d, linear(d, 1601)) + linear(d, 2)
    return words(d, 28996) + regions + layers * block(d) + linear(d, d) + heads


def blip(pixels=224, image=768, layers=12, text=True, decoder="shared", heads=True):
    d, read = 768, attention(768) + attention(768, image) + ffn(768)
    whole = vit(image, 16, pixels, layers) + words(d, 30524, types=0)
    whole += 12 * read if text else 0
    # shared: the decoder has self-attentions of its own; alone: its layers too, which there are no others of
    whole += {"shared": 12 * attention(d) + transform(d, 30524), "alone": 12 * read + transform(d, 30524),
              "apart": words(d, 30524, types=0) + 12 * (attention(d) * 2 + ffn(d)) + transform(d, 30524),
              None: 0}[decoder]  # fmt: skip
    return whole + (linear(d, 256) + linear(image, 256) + 1 + linear(d, 2) if heads else 0)


def mlim(d, cnn, cells, layers, doublings, smooth):
    up = [d >> n for n in range(doublings + 1)]  # channels halve as often as the side doubles
    drawing = sum(4 * a * b + b for a, b in pairwise(up))
    drawing += sum(9 * a * b + b for a, b in zip([up[-1], *smooth], [*smooth, 3]))
    trunk = words(d, 30522) + cnn + cells * d + layers * block(d) + linear(d, d)
    return trunk + transform(d, 30522) + drawing


DEAD = 11_020_800  # of ViLBERT's release: numbers that take part in nothing and are not here
RELEASED = {  # counted in the release's own model, or in its file
    "uniter": 112_938_887, "visual_bert": 112_074_812, "vl_bert": 114_491_515, "vl_bert_large": 342_071_675,
    "vilbert": 250_044_029 - DEAD, "twelve_in_one": 268_028_859 - DEAD, "lxmert": 228_051_752, "vilt": 135_660_092,
    "clip": 151_277_313, "clip_large": 427_616_513,
}  # fmt: skip
TRUNKS = {  # the same without the heads of pre-training
    "uniter": 109_898_752, "visual_bert": 111_450_624, "vilbert": 246_726_656 - DEAD, "lxmert": 207_936_768,
    "vilt": 111_595_008,
    "mlim": 335_141_888 + 202_368 + 144 * 1024,  # transformers' BertModel of bert-large-uncased, the CNN, its cells
}  # fmt: skip
# the release's encoder; a region's projection and [IMG]; three vectors that only pre-training reads
VL_BERT = 108_896_256 + linear(2048 + 2048, 768) + 768 + 2 * 768 + 2048
BY_HAND = {
    "uniter": uniter(768, 12), "uniter_large": uniter(1024, 24),
    "lxmert_vqa": TRUNKS["lxmert"] + linear(768, 1536) + 2 * 1536 + linear(1536, 3129),
    "lxmert_nlvr2": TRUNKS["lxmert"] + linear(1536, 1536) + 2 * 1536 + linear(1536, 2),
    "vl_bert_refcoco": VL_BERT + linear(768, 768) + linear(768, 1),
    "vl_bert_vcr": VL_BERT + linear(768, 768) + linear(768, 1) + linear(768, 768) + linear(768, 81),
    "blip": blip(), "blip_large": blip(image=1024, layers=24), "blip_retrieval": blip(384, decoder=None),
    "blip_caption": blip(384, text=False, decoder="alone", heads=False),
    "blip_vqa": blip(480, decoder="apart", heads=False),
    # a second cross-attention in every layer, whose norm is the first one's, and a linear that merges them in six
    "blip_nlvr2": blip(384, decoder=None, heads=False) + 12 * (attention(768) - 2 * 768) + 6 * linear(2 * 768, 768)
                  + linear(768, 768) + linear(768, 2),
    "mlim": mlim(1024, 202_368, 144, 24, doublings=5, smooth=[16] * 4),
    "mlim_grid3": mlim(1024, 198_788, 9, 24, doublings=7, smooth=[8] * 2),
    "mlim_base": mlim(768, 202_368 - (1024 - 768) * linear(80, 1), 49, 12, doublings=5, smooth=[12] * 4),
    # ViT-B/16 without pooler, GPT-2, and twelve cross-attentions between them
    "vision_encoder_decoder": vit(768, 16, 224, 12) + 124_439_808 + 12 * attention(768),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def build(name):
    config = preset(name)[1]()
    with torch.device("meta"):
        return VLModel(config) if isinstance(config, VLConfig) else CaptionModel(config)


@pytest.mark.parametrize("name", names())
def test_the_whole(name):
    expected = {table[name] for table in (RELEASED, BY_HAND) if name in table}
    assert expected == {count(build(name))}


@pytest.mark.parametrize("name", TRUNKS)
def test_without_heads(name):
    model = build(name)
    assert count(model) - count(model.heads) == TRUNKS[name]


def test_lxmert_s_parts():
    model = build("lxmert")
    schedule, heads = model.schedule, model.heads
    parts = {"embeddings": model.text, "language": schedule.language, "objects": schedule.objects,
             "cross": schedule.cross, "regions": model.image, "pooler": model.poolers, "answers": heads["answers"],
             "region labels": heads["regions"]}  # fmt: skip
    assert {name: round(count(part) / 1e6, 2) for name, part in parts.items()} == {
        "embeddings": 23.84, "language": 63.79, "objects": 35.44, "cross": 82.70, "regions": 1.58, "pooler": 0.59,
        "answers": 15.79, "region labels": 3.71}  # fmt: skip


def test_vl_bert_s_encoder():
    """The release's class for VQA without its heads: what it reads regions by is outside of it, hidden ones too."""
    model = build("vl_bert")
    outside = [model.heads, model.image.project]
    alone = [model.image.token, model.image.hidden_token, model.image.hidden_feature,
             model.schedule.meet[0].no_picture]  # fmt: skip
    assert count(model) - sum(map(count, outside)) - sum(p.numel() for p in alone) == 108_896_256


def test_vilt_s_patches():
    assert count(build("vilt").image.project) == 3 * 32 * 32 * 768 + 768
