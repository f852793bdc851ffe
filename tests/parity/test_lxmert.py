"""LXMERT against its recorded release, and against transformers' classes with random weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LxmertConfig, LxmertForPreTraining, LxmertForQuestionAnswering

from interlace.embed.regions import LXMERTRegions, Regions
from interlace.embed.words import Words
from interlace.layers import Width
from interlace.model import VLModel
from interlace.objectives.base import Views
from interlace.objectives.mlm import masked_words
from interlace.objectives.region_labels import feature_loss, label_loss
from interlace.objectives.vqa import VQA
from interlace.presets import lxmert
from interlace.weights import load_foreign, save_foreign
from tests.boxes import ordered

SYSTEM = "lxmert"


def sizes(c, preset=lxmert.lxmert, **changes):
    width = Width(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"], activation=c["hidden_act"])
    words = Words(width, pool="tanh", vocabulary=c["vocab_size"], positions=c["max_position_embeddings"],
                  types=c["type_vocab_size"])  # fmt: skip
    regions = LXMERTRegions(width, features=c["visual_feat_dim"], boxes=c["visual_pos_dim"])
    layers = c["l_layers"], c["r_layers"], c["x_layers"]
    return preset(text=words, image=regions, layers=layers, **changes)


@pytest.fixture(scope="module")
def model(golden):
    c = golden.config
    labels = {"objects": c["obj_id_num"], "attributes": c["attr_id_num"], "answers": c["num_answers"]}
    model = VLModel(sizes(c, **labels)).eval()
    report = load_foreign(model, golden.weights, lxmert.KEYS)
    assert not report.dropped and not report.fresh
    return model


@pytest.fixture(scope="module")
def run(golden, model):
    """The model's output for words and features of these names."""

    def run(ids="input_ids", features="visual_feats", mask=None, model=model):
        i = golden.inputs
        regions = Regions(i[features], i["pos"])
        return model(i[ids], regions, i["attention_mask"], None if mask is None else i[mask], i["token_type_ids"])

    return run


def test_embeddings(golden, model):
    i = golden.inputs
    golden.close(model.text(i["input_ids"], type_ids=i["token_type_ids"]), "embedding_output", i["attention_mask"])
    golden.close(model.image(Regions(i["visual_feats"], i["pos"])), "visual_embedding")


def test_states_and_pooled(golden, run):
    out, real = run(), golden.inputs["attention_mask"]
    golden.close(out.text, "lang_output", real)
    golden.close(out.image, "visn_output")
    golden.close(out.pooled_text, "pooled_output")


def test_states_with_a_mask_of_regions(golden, run):
    out, real = run(mask="visual_attention_mask"), golden.inputs["attention_mask"]
    golden.close(out.text, "masked_lang_output", real)
    golden.close(out.image, "masked_visn_output", golden.inputs["visual_attention_mask"])
    golden.close(out.pooled_text, "masked_pooled_output")


def test_heads(golden, model, run):
    out, heads = run(), model.heads
    golden.close(heads["mlm"](out.text, model.text.words.weight), "lang_logits", golden.inputs["attention_mask"])
    golden.close(heads["match"](out.pooled_text), "matched_logits")
    golden.close(heads["answers"](out.pooled_text), "qa_logits")
    regions = heads["regions"](out.image)
    for ours, theirs in (("objects", "obj"), ("attributes", "attr"), ("features", "feat")):
        golden.close(regions[ours], f"visual_pred_{theirs}")


def test_losses(golden, model, run):
    out, heads, i = run("masked_input_ids", "masked_visual_feats"), model.heads, golden.inputs
    words, regions = heads["mlm"](out.text, model.text.words.weight), heads["regions"](out.image)
    answers = heads["answers"](out.pooled_text)
    golden.close(answers, "loss_run_qa_logits")
    losses = torch.stack([
        masked_words(words, i["masked_lm_labels"]),
        F.cross_entropy(heads["match"](out.pooled_text), i["matched_label"]),
        label_loss(regions["objects"], i["obj_labels"], i["obj_conf"]),
        label_loss(regions["attributes"], i["attr_labels"], i["attr_conf"]),
        feature_loss(regions["features"], i["visual_feats"], i["feat_mask"]),
        masked_words(answers, i["answers"]),
    ])  # fmt: skip
    golden.close(losses[None], "losses")
    golden.close(losses.sum(), "loss_total")


def test_vqa_head_and_loss(golden):
    c, i = golden.config, golden.inputs
    model = VLModel(sizes(c, lxmert.lxmert_vqa, answers=c["vqa_num_answers"])).eval()
    body = {f"lxrt_encoder.model.{k}": v for k, v in golden.weights.items() if k.startswith("bert.")}
    report = load_foreign(model, body | golden.part("weights.vqa"), lxmert.VQA_KEYS)
    assert not report.dropped and not report.fresh
    question = model.half_text(i["input_ids"], i["attention_mask"], i["token_type_ids"])
    image = model.half_image(Regions(i["visual_feats"], i["pos"]))
    out = model.fuse(question, image)
    golden.close(model.heads["answers"](out.pooled_text, out.pooled_image), "vqa_logits")
    batch = {"answer_scores": i["vqa_targets"], "question_real": torch.ones(len(i["vqa_targets"]), dtype=torch.bool)}
    views = Views(model, batch)
    views._halves = {"question": question, "image": image}  # the recorded question has token types, a batch has none
    golden.close(VQA().loss(model, batch, views).loss, "vqa_loss")


def test_names_of_the_release_both_ways(golden, model):
    back = save_foreign(model, lxmert.KEYS)
    assert set(back) == set(golden.weights)
    for name, value in golden.weights.items():
        assert torch.equal(back[name], value), name


# ------------------------------------------------------------------------------------------------------ transformers

HF = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128, "l_layers": 2,
      "r_layers": 1, "x_layers": 2, "max_position_embeddings": 24, "visual_feat_dim": 20, "num_object_labels": 7,
      "num_attr_labels": 5, "num_qa_labels": 11}  # fmt: skip


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # biases and norms too, or half of the names are not checked
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    region_mask = torch.ones(3, 6)
    region_mask[2, 4:] = 0
    words, types = torch.randint(1, 99, (3, 8), generator=g), torch.randint(0, 2, (3, 8), generator=g)
    return {"input_ids": words, "attention_mask": mask, "token_type_ids": types, "visual_attention_mask": region_mask,
            "visual_feats": torch.randn(3, 6, 20, generator=g),
            "visual_pos": ordered(torch.rand(3, 6, 4, generator=g))}  # fmt: skip


def ours_on(model, batch):
    regions = Regions(batch["visual_feats"], batch["visual_pos"])
    return model(batch["input_ids"], regions, batch["attention_mask"], batch["visual_attention_mask"],
                 batch["token_type_ids"])  # fmt: skip


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_transformers_pretraining(batch):
    theirs = random_weights(LxmertForPreTraining(LxmertConfig(**HF, visual_loss_normalizer=1 / 0.15)))
    model = VLModel(lxmert.tiny()).eval()
    load_foreign(model, theirs.state_dict(), lxmert.HF_KEYS)
    base, out, heads = theirs.lxmert(**batch), ours_on(model, batch), model.heads
    real, seen = batch["attention_mask"].bool(), batch["visual_attention_mask"].bool()
    close(out.text[real], base.language_output[real])
    close(out.image[seen], base.vision_output[seen])
    close(out.pooled_text, base.pooled_output)

    g = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 99, (3, 8), generator=g).masked_fill((torch.rand(3, 8, generator=g) > 0.4) | ~real, -100)
    match, answers = torch.tensor([1, 0, 1]), torch.tensor([3, -100, 10])
    objects, attributes = torch.randint(0, 7, (3, 6), generator=g), torch.randint(0, 5, (3, 6), generator=g)
    target, sure = torch.randn(3, 6, 20, generator=g), torch.rand(3, 6, generator=g) * seen
    visual = {"obj": (objects, sure), "attr": (attributes, sure), "feat": (target, sure)}
    expected = theirs(**batch, labels=labels, matched_label=match, ans=answers, obj_labels=visual)
    words, regions = heads["mlm"](out.text, model.text.words.weight), heads["regions"](out.image)
    close(words[real], expected.prediction_logits[real])
    close(heads["match"](out.pooled_text), expected.cross_relationship_score)
    close(heads["answers"](out.pooled_text), expected.question_answering_score)
    total = (
        masked_words(words, labels)
        + F.cross_entropy(heads["match"](out.pooled_text), match)
        + masked_words(heads["answers"](out.pooled_text), answers)
        + label_loss(regions["objects"], objects, sure)
        + label_loss(regions["attributes"], attributes, sure)
        + feature_loss(regions["features"], target, sure)
    )
    close(total, expected.loss)


def test_transformers_question_answering(batch):
    theirs = random_weights(LxmertForQuestionAnswering(LxmertConfig(**HF)))
    model = VLModel(sizes(HF | {"hidden_act": "gelu", "visual_pos_dim": 4, "type_vocab_size": 2}, lxmert.lxmert_vqa,
                          answers=11)).eval()  # fmt: skip
    load_foreign(model, theirs.state_dict(), lxmert.HF_KEYS)
    out = ours_on(model, batch)
    close(model.heads["answers"](out.pooled_text), theirs(**batch).question_answering_score)
    assert set(save_foreign(model, lxmert.HF_KEYS)) == set(theirs.state_dict()) | {"cls.predictions.decoder.weight"}
