"""VL-BERT against what its release computed: input, states, masked words with and without a picture, regions, VQA."""

import pytest
import torch
from torch.nn import functional as F

from interlace.embed.regions import Regions
from interlace.embed.vl_bert import VLBERTRegions, VLBERTWords, meet
from interlace.layers import JOINT, Width
from interlace.model import VLModel
from interlace.objectives.mlm import masked_words
from interlace.objectives.mvm import spread_cross_entropy
from interlace.presets import vl_bert
from interlace.streams import Streams, everyone
from interlace.weights import load_foreign, save_foreign

SYSTEM = "vlbert"


def build(golden, heads, pool="first"):
    c = golden.config["NETWORK"]["VLBERT"]
    width = Width(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"], activation=c["hidden_act"])
    words = VLBERTWords(width, pool=pool, vocabulary=c["vocab_size"], types=c["type_vocab_size"] - 1)
    regions = VLBERTRegions(width, features=golden.inputs["boxes"].shape[-1] - 4)
    segments = {"meet": [meet(c["max_position_embeddings"])], "joint": [JOINT] * c["num_hidden_layers"]}
    return VLModel(vl_bert.vl_bert(text=words, image=regions, segments=segments, heads=heads)).eval()


@pytest.fixture(scope="module")
def model(golden):
    c = golden.config["NETWORK"]["VLBERT"]
    model = build(golden, vl_bert.heads(c["vocab_size"], c["visual_region_classes"]))
    report = load_foreign(model, golden.weights, vl_bert.KEYS)
    assert not report.dropped and not report.fresh
    return model


def regions(golden, hidden=False):
    i = golden.inputs
    sides = i["im_info"][:, None, [0, 1, 0, 1]]
    boxes, features = i["boxes"].split([4, i["boxes"].shape[-1] - 4], -1)
    return Regions(features, boxes / sides, i["mvrc_ops"].bool() if hidden else None), boxes[..., 0] > -1.5


def compact(text, image, text_mask, image_mask, length):
    """The release's order, per row: words, regions, [END], padding."""
    rows = [torch.cat([t[a.bool()], i[b.bool()].roll(-1, 0)]) for t, i, a, b in zip(text, image, text_mask, image_mask)]
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def pairs_and_texts(golden, model, until=None):
    """What the release puts in one batch, captions with regions and texts alone, in its order; which rows are real."""
    i, (found, image_mask) = golden.inputs, regions(golden, hidden=True)
    length = golden.outputs["sequence_output"].shape[1]
    rows, real = [], []
    for ids, image in ((i["text"], model.half_image(found, image_mask)), (i["aux_text"], None)):
        text = model.half_text(ids, ids > 0)
        see = everyone(text.mask, None if image is None else image.mask)
        streams = Streams(text.states, None if image is None else image.states)
        streams = model.schedule.run(streams, see, stop=until)
        cells = torch.ones(len(ids), 1) if image is None else image.mask
        rows.append(compact(streams.text, streams.image, text.mask, cells, length))
        real.append(torch.arange(length) < (text.mask.sum(1) + cells.sum(1))[:, None])
    return torch.cat(rows), torch.cat(real)


def test_regions_input_and_states(golden, model):
    found, mask = regions(golden, hidden=True)
    golden.close(model.image.objects(found), "obj_reps", mask)
    for until, name in ((1, "embedding_output"), (None, "sequence_output")):
        states, real = pairs_and_texts(golden, model, until)
        golden.close(states, name, real)


def test_pretraining(golden, model):
    i, (found, mask), table = golden.inputs, regions(golden, hidden=True), model.text.words.weight
    out = model(i["text"], found, i["text"] > 0, mask)
    alone = model.fuse(model.half_text(i["aux_text"], i["aux_text"] > 0), None)
    words, longest = model.heads["mlm"](out.text, table), golden.outputs["mlm_logits_wvc"].shape[1]
    extra = longest - words.shape[1]
    golden.close(F.pad(words, (0, 0, 0, extra)), "mlm_logits_wvc", F.pad(i["text"], (0, extra)) > 0)
    texts = model.heads["mlm"](alone.text, table)
    golden.close(F.pad(texts, (0, 0, 0, longest - texts.shape[1])), "mlm_logits_aux",
                 F.pad(i["aux_text"], (0, longest - texts.shape[1])) > 0)  # fmt: skip
    said, seen = [F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (out.text, alone.text)], out.image[:, 1:]
    real = [F.pad(ids, (0, longest - ids.shape[1])) > 0 for ids in (i["text"], i["aux_text"])]
    golden.close(torch.cat(said), "text_hidden", torch.cat(real))
    nothing = torch.zeros(len(i["aux_text"]), *seen.shape[1:])  # texts alone have no objects
    golden.close(torch.cat([seen * mask.unsqueeze(-1), nothing]), "object_hidden")
    classes = model.heads["mvrc"](seen)
    golden.close(classes, "mvrc_logits", mask)
    losses = (masked_words(words, i["mlm_labels"]), masked_words(texts, i["aux_mlm_labels"]),
              spread_cross_entropy(classes, i["mvrc_labels"]))  # fmt: skip
    for loss, name in zip(losses, ("mlm_loss_wvc", "mlm_loss_aux", "mvrc_loss")):
        golden.close(loss, name)
    golden.close(sum(losses), "loss")


def question(golden):
    """[CLS] question [SEP] [MASK] [SEP], its types, and where [MASK] is."""
    i, special = golden.inputs["question"], golden.config["special_ids"]
    rows = [row[row > 0].tolist() for row in i]
    longest = max(map(len, rows)) + 4
    ids, types = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for n, row in enumerate(rows):
        whole = [special["[CLS]"], *row, special["[SEP]"], special["[MASK]"], special["[SEP]"]]
        ids[n, : len(whole)] = torch.tensor(whole)
        types[n, len(whole) - 2 : len(whole)] = 1
    return ids, types, torch.tensor([len(row) + 2 for row in rows])


def test_answers(golden):
    labels = golden.config["DATASET"]["ANSWER_VOCAB_SIZE"]
    model = build(golden, {"answers": {"kind": "transformed", "labels": labels, "dropout": 0.1}}, pool="tanh")
    load_foreign(model, golden.weights | golden.part("weights.vqa"), vl_bert.KEYS)
    (found, mask), (ids, types, at) = regions(golden), question(golden)
    out = model(ids, found, ids > 0, mask, types)
    cells = F.pad(mask, (1, 0), value=True)
    length = golden.outputs["vqa_sequence_output"].shape[1]
    real = torch.arange(length) < ((ids > 0).sum(1) + cells.sum(1))[:, None]
    golden.close(compact(out.text, out.image, ids > 0, cells, length), "vqa_sequence_output", real)
    golden.close(out.pooled_text, "vqa_pooled_output")
    logits = model.heads["answers"](out.text[torch.arange(len(ids)), at])
    golden.close(logits, "vqa_logits")
    golden.close(F.binary_cross_entropy_with_logits(logits, golden.inputs["vqa_label"]) * labels, "vqa_loss")


def test_names_both_ways(golden, model):
    back = save_foreign(model, vl_bert.KEYS, prefix="module.")
    assert set(back) == {f"module.{name}" for name in golden.weights}
    for name, value in golden.weights.items():
        assert torch.equal(back[f"module.{name}"], value), name
