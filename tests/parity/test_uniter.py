"""UNITER against what its release computed: states, every pre-training task, four fine-tuning heads."""

import pytest
import torch
from torch.nn import functional as F

from interlace.embed.regions import Regions, UNITERRegions, seven
from interlace.embed.words import Words
from interlace.layers import JOINT, Width
from interlace.model import VLModel
from interlace.objectives import mlm, mvm, rank, wra
from interlace.presets import uniter
from interlace.streams import Streams, everyone
from interlace.weights import load_foreign, save_foreign

SYSTEM = "uniter"


def build(golden, types=0, heads=None):
    c = golden.config
    types = types or c["type_vocab_size"]
    width = Width(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"], activation=c["hidden_act"])
    words = Words(width, pool="tanh", vocabulary=c["vocab_size"], positions=c["max_position_embeddings"], types=types)
    heads = uniter.heads(c["vocab_size"], c["img_dim"], c["img_label_dim"]) if heads is None else heads
    regions, segments = UNITERRegions(width, features=c["img_dim"]), {"joint": [JOINT] * c["num_hidden_layers"]}
    return VLModel(uniter.uniter(text=words, image=regions, segments=segments, heads=heads)).eval()


@pytest.fixture(scope="module")
def model(golden):
    model = build(golden)
    report = load_foreign(model, golden.weights, uniter.KEYS)
    assert not report.dropped and not report.fresh
    return model


def masks(golden):
    lengths, counts = golden.inputs["text_lengths"], golden.inputs["region_counts"]
    longest, most = golden.inputs["input_ids"].shape[1], golden.inputs["img_feat"].shape[1]
    return torch.arange(longest) < lengths[:, None], torch.arange(most) < counts[:, None]


def run(model, golden, ids="input_ids", hidden=None):
    i = golden.inputs
    text_mask, image_mask = masks(golden)
    return model(i[ids], Regions(i["img_feat"], i["img_pos_feat"], hidden), text_mask, image_mask)


def compact(out, index):
    """Text, padding, regions, padding -> the release's order: text, regions, padding."""
    joint = torch.cat([out.text, out.image], 1)
    return joint.gather(1, index.unsqueeze(-1).expand(-1, -1, joint.shape[-1]))


def test_embeddings_every_layer_and_the_pooled_vector(golden, model):
    i = golden.inputs
    text_mask, image_mask = masks(golden)
    real = i["attn_masks"]
    text = model.half_text(i["input_ids"], text_mask)
    image = model.half_image(Regions(i["img_feat"], i["img_pos_feat"]), image_mask)
    streams = Streams(text.states, image.states)
    golden.close(compact(streams, i["gather_index"]), "embedding_output", real)
    for n in range(golden.config["num_hidden_layers"]):
        streams = model.schedule.run(streams, everyone(text_mask, image_mask), n, n + 1)
        golden.close(compact(streams, i["gather_index"]), f"hidden_layer_{n}", real)
    out = run(model, golden)
    golden.close(compact(out, i["gather_index"]), "sequence_output", real)
    golden.close(out.pooled_text, "pooled_output")


def test_one_stream_alone(golden, model):
    i = golden.inputs
    text_mask, image_mask = masks(golden)
    text = model.half_text(i["input_ids"], text_mask)
    golden.close(model.fuse(text, None).text, "text_only_sequence_output", text_mask)
    image = model.half_image(Regions(i["img_feat"], i["img_pos_feat"]), image_mask)
    golden.close(model.fuse(None, image).image, "image_only_sequence_output", image_mask)


def test_boxes_have_seven_numbers(golden):
    boxes, real = golden.inputs["img_pos_feat"], masks(golden)[1]
    torch.testing.assert_close(seven(boxes[..., :4])[real], boxes[real])


def test_masked_words(golden, model):
    out, labels = run(model, golden, "mlm_input_ids"), golden.inputs["mlm_labels"]
    logits = model.heads["mlm"](out.text, model.text.words.weight)
    golden.close(logits[labels >= 0], "mlm_logits")
    golden.close(mlm.word_losses(logits, labels), "mlm_loss")
    torch.testing.assert_close(mlm.masked_words(logits, labels), golden.outputs["mlm_loss"].mean())


def test_masked_regions(golden, model):
    i = golden.inputs
    out = run(model, golden, hidden=i["img_masks"])
    golden.close(compact(out, i["gather_index"]), "mrm_sequence_output", i["attn_masks"])
    states = out.image[i["img_masks"]]
    features = model.heads["mrfr"](states, model.image.features.weight.t())
    golden.close(features, "mrfr_pred")
    golden.close(mvm.feature_losses(features, i["feat_targets"]), "mrfr_loss")
    classes = model.heads["mrc"](states)
    golden.close(classes, "mrc_logits")
    golden.close(mvm.class_losses(classes, i["label_targets"]), "mrc_loss")
    golden.close(mvm.belief_losses(classes, i["label_targets"]), "mrc_kl_loss")


def test_matching_and_alignment(golden, model):
    out, target = run(model, golden), golden.inputs["itm_targets"]
    logits = model.heads["match"](out.pooled_text, out.pooled_image)
    golden.close(logits, "itm_logits")
    golden.close(F.cross_entropy(logits, target, reduction="none"), "itm_loss")
    distance = wra.transport_distance(out.text, out.image, *masks(golden))
    golden.close(distance[target == 1], "ot_pos_dist")
    golden.close(distance[target == 0], "ot_neg_dist")
    golden.close(wra.alignment_loss(distance, target), "itm_ot_loss_batch")


def test_transport(golden):
    i = golden.inputs
    real = ~i["ot_txt_pad"], ~i["ot_img_pad"]
    cost = wra.cosine_cost(i["otfn_txt_emb"], i["otfn_img_emb"], *real)
    golden.close(cost, "otfn_cost")
    golden.close(wra.transport_plan(cost, *real), "otfn_plan")
    golden.close(wra.transport_distance(i["otfn_txt_emb"], i["otfn_img_emb"], *real), "otfn_dist")


def with_head(golden, group, **head):
    model = build(golden, heads=head)
    body = {k: v for k, v in golden.weights.items() if k.startswith("uniter.")}
    load_foreign(model, body | golden.part(group), uniter.KEYS)
    return model


def test_answers(golden):
    c = golden.config
    model = with_head(golden, "weights.vqa", answers=uniter.answers(c["num_answer"], c["hidden_size"]))
    logits = model.heads["answers"](run(model, golden).pooled_text)
    golden.close(logits, "vqa_logits")
    golden.close(F.binary_cross_entropy_with_logits(logits, golden.inputs["vqa_targets"], reduction="none"), "vqa_loss")


def test_ranking_starts_as_the_matching_class(golden, model):
    itm = {k: v for k, v in golden.weights.items() if k.startswith("uniter.")}
    itm |= {f"rank_output.{leaf}": golden.weights[f"itm_output.{leaf}"][1:] for leaf in ("weight", "bias")}
    ranker = build(golden, heads={"rank": {"kind": "linear", "labels": 1}})
    load_foreign(ranker, itm, uniter.KEYS)
    scores = ranker.heads["rank"](run(ranker, golden).pooled_text)
    golden.close(scores, "rank_scores")
    groups = len(golden.outputs["rank_loss"])  # each a pair and its negatives
    golden.close(rank.margin_losses(scores.view(groups, -1)), "rank_loss")


def test_referring_expressions(golden):
    model = with_head(golden, "weights.re", refer={"kind": "transformed", "labels": 1, "stream": "image"})
    scores = model.heads["refer"](run(model, golden).image).squeeze(-1)
    golden.close(scores.masked_fill(golden.inputs["re_obj_masks"], -1e4), "re_scores")


def test_two_pictures(golden):
    i, c = {k[6:]: v for k, v in golden.inputs.items() if k.startswith("nlvr2_")}, golden.config
    model = build(golden, types=3, heads={"pair": {"kind": "uniter_pair", "heads": c["num_attention_heads"]}})
    load_foreign(model, golden.part("weights.nlvr2"), uniter.KEYS)
    words, regions = i["input_ids"].shape[1], i["img_feat"].shape[1]
    real = torch.zeros(len(i["input_ids"]), words + regions)  # the padding the release's index leaves out
    real = real.scatter_reduce(1, i["gather_index"], i["attn_masks"].float(), reduce="amax").bool()
    text_mask, image_mask = real.split([words, regions], 1)
    pictures = Regions(i["img_feat"], i["img_pos_feat"], types=i["img_type_ids"])
    out = model(i["input_ids"], pictures, text_mask, image_mask)
    joint = torch.cat([out.text, out.image], 1)
    golden.close(model.heads["pair"](joint[::2], joint[1::2], real[::2], real[1::2]), "nlvr2_logits")


def test_names_both_ways(golden, model):
    back = save_foreign(model, uniter.KEYS)
    assert set(back) == set(golden.weights)
    for name, value in golden.weights.items():
        assert torch.equal(back[name], value), name
