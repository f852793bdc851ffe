"""ViLT: every recorded output of the original release, under its own names."""

import pytest
import torch
from torch.nn import functional as F

from interlace.layers import Width
from interlace.model import VLModel
from interlace.objectives.wra import alignment_loss, transport_distance
from interlace.presets import vilt
from interlace.weights import load_foreign, save_foreign

SYSTEM = "vilt"


def config(golden, **changes):
    c = golden.config
    width = Width(c["hidden_size"], heads=c["num_heads"], ffn=int(c["mlp_ratio"] * c["hidden_size"]), norm="pre",
                  eps=c["vision_layer_norm_eps"], attention_dropout=0.0)  # fmt: skip
    text = {"vocabulary": c["vocab_size"], "positions": c["max_text_len"], "eps": c["text_layer_norm_eps"]}
    image = {"size": c["image_size"], "patch": c["patch_size"], **changes.pop("image", {})}
    return vilt.vilt(width, c["num_layers"], text, image, **changes)


def load(golden, *overlays, **changes):
    model = VLModel(config(golden, **changes)).eval()
    weights = dict(golden.weights)
    for overlay in overlays:
        weights |= golden.part(overlay)
    return model, load_foreign(model, weights, vilt.KEYS)


def pixel_mask(golden):
    mask = torch.zeros(golden.inputs["image"].shape[0], *golden.inputs["image"].shape[2:])
    for row, (h, w) in enumerate(golden.inputs["image_sizes"].tolist()):
        mask[row, :h, :w] = 1
    return mask


@pytest.fixture(scope="module")
def model(golden):
    return load(golden)[0]


@pytest.fixture(scope="module")
def halves(golden, model):
    return (model.half_text(golden.inputs["text_ids"], golden.inputs["text_masks"]),
            model.half_image(golden.inputs["image"], pixel_mask(golden)))  # fmt: skip


def false_mask(golden):
    # the recorded batch gives no sizes for the false pictures: as in the release, padding is where a pixel is zero
    return (golden.inputs["false_image"].sum(1) != 0).float()


def test_every_name_is_mapped_or_dropped_on_purpose(golden):
    _, report = load(golden)
    assert report.dropped == ["text_embeddings.position_ids"] and not report.fresh


def test_embeddings_masks_and_places(golden, model):
    image, kept, places = model.image.embed(golden.inputs["image"], pixel_mask(golden))
    text = model.text(golden.inputs["text_ids"]) - model.text.modality
    assert torch.equal(kept.long(), golden.outputs["image_masks"])
    golden.close(image, "visual_embed", kept)
    golden.close(places, "patch_index", kept[:, 1:])
    golden.close(text, "text_embed", golden.inputs["text_masks"])


def test_states_and_heads(golden, model, halves):
    text, image = halves
    out = model.fuse(text, image)
    golden.close(out.text, "text_feats", text.mask)
    golden.close(out.image, "image_feats", image.mask)
    golden.close(out.pooled_text, "cls_feats")
    golden.close(model.heads["match"](out.pooled_text), "itm_logits_pairs")


def test_masked_words(golden, model, halves):
    text = model.half_text(golden.inputs["text_ids_mlm"], golden.inputs["text_masks"])
    logits = model.heads["mlm"](model.fuse(text, halves[1]).text)
    golden.close(logits, "mlm_logits", text.mask)
    loss = F.cross_entropy(logits.flatten(0, 1), golden.inputs["text_labels_mlm"].flatten(), ignore_index=-100)
    golden.close(loss, "mlm_loss")


def mixed(golden):
    """Pictures and their masks with the wrong picture where the label is 0."""
    right = golden.inputs["itm_labels"].bool()
    pixels = torch.where(right[:, None, None, None], golden.inputs["image"], golden.inputs["false_image"])
    return pixels, torch.where(right[:, None, None], pixel_mask(golden), false_mask(golden))


def test_matching(golden, model, halves):
    logits = model.heads["match"](model.fuse(halves[0], model.half_image(*mixed(golden))).pooled_text)
    golden.close(logits, "itm_logits")
    golden.close(F.cross_entropy(logits, golden.inputs["itm_labels"]), "itm_loss")


def test_answers(golden):
    labels = golden.config["vqav2_label_size"]
    model, report = load(golden, "weights.vqa", heads={"answers": vilt.answers(labels)})
    assert all(name.split(".")[0] in ("mlm_score", "itm_score", "text_embeddings") for name in report.dropped)
    out = model(golden.inputs["text_ids"], golden.inputs["image"], golden.inputs["text_masks"], pixel_mask(golden))
    logits = model.heads["answers"](out.pooled_text)
    golden.close(logits, "vqa_logits")
    golden.close(F.binary_cross_entropy_with_logits(logits, golden.inputs["vqa_targets"]) * labels, "vqa_loss")


def test_two_pictures(golden):
    model, _ = load(golden, "weights.nlvr2", heads={"nlvr2": vilt.NLVR2}, image={"images": 2})
    text = model.half_text(golden.inputs["text_ids"], golden.inputs["text_masks"])
    first = vilt.picture(model, golden.inputs["image"], pixel_mask(golden))
    second = vilt.picture(model, golden.inputs["false_image"], false_mask(golden), 1)
    logits = vilt.compare(model, text, first, second)
    golden.close(logits, "nlvr2_logits")
    golden.close(F.cross_entropy(logits, golden.inputs["nlvr2_labels"]), "nlvr2_loss")


def test_rank_scores_start_as_the_match_head(golden, halves):
    ranker = VLModel(config(golden, heads={"rank": vilt.RANK})).eval()
    weights = dict(golden.weights)
    weights["rank_output.weight"], weights["rank_output.bias"] = (
        weights["itm_score.fc.weight"][1:], weights["itm_score.fc.bias"][1:])  # fmt: skip
    load_foreign(ranker, weights, vilt.KEYS)
    golden.close(ranker.heads["rank"](ranker.fuse(*halves).pooled_text), "rank_scores")


def test_the_names_read_backwards(golden, model):
    back = save_foreign(model, vilt.KEYS)
    assert set(back) | {"text_embeddings.position_ids"} == set(golden.weights)
    for name, value in back.items():
        assert torch.equal(value, golden.weights[name]), name


def test_word_patch_alignment(golden, model, halves):
    text, image = halves[0], model.half_image(*mixed(golden))
    out = model.fuse(text, image)
    distance = transport_distance(out.text, out.image, *vilt.align(text.mask, image.mask))
    loss = 0.1 * alignment_loss(distance, golden.inputs["itm_labels"])
    golden.close(distance, "wpa_distance")
    golden.close(loss, "itm_wpa_loss")
