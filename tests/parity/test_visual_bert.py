"""VisualBERT against what its release computed and against transformers: states, pre-training, three tasks."""

import pytest
import torch
from torch.nn import functional as F
from transformers import VisualBertConfig, VisualBertForPreTraining

from interlace.embed.regions import Regions, VisualBERTRegions
from interlace.embed.words import Words
from interlace.layers import JOINT, Width
from interlace.model import VLModel
from interlace.objectives.mlm import masked_words
from interlace.presets import visual_bert
from interlace.weights import load_foreign, save_foreign

SYSTEM = "visualbert"


def build(c, heads):
    width = Width(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"], activation=c["hidden_act"])
    sizes = {"positions": c["max_position_embeddings"], "types": c["type_vocab_size"]}
    words = Words(width, pool="tanh", vocabulary=c["vocab_size"], **sizes)
    regions = VisualBERTRegions(width, features=c["visual_embedding_dim"], **sizes)
    segments = {"joint": [JOINT] * c["num_hidden_layers"]}
    return VLModel(visual_bert.visual_bert(text=words, image=regions, segments=segments, heads=heads)).eval()


@pytest.fixture(scope="module")
def model(golden):
    model = build(golden.config, visual_bert.heads(golden.config["vocab_size"]))
    report = load_foreign(model, golden.weights, visual_bert.KEYS)
    assert not report.dropped and not report.fresh
    return model


def with_head(golden, group, **head):
    model = build(golden.config, head)
    body = {k: v for k, v in golden.weights.items() if k.startswith("bert.")}
    load_foreign(model, body | golden.part(group), visual_bert.KEYS)
    return model


def run(model, golden, ids="input_ids", **more):
    i = golden.inputs
    regions = Regions(i["visual_embeddings"], None, **more)
    return model(i[ids], regions, i["input_mask"], i["image_mask"], i["token_type_ids"])


def joint(out):
    return torch.cat([out.text, out.image], 1)


def real(golden):
    return torch.cat([golden.inputs["input_mask"], golden.inputs["image_mask"]], 1)


def test_embeddings_states_and_the_pooled_vector(golden, model):
    i = golden.inputs
    text = model.half_text(i["input_ids"], i["input_mask"], i["token_type_ids"])
    image = model.half_image(Regions(i["visual_embeddings"], None), i["image_mask"])
    golden.close(torch.cat([text.states, image.states], 1), "embedding_output", real(golden))
    out = run(model, golden)
    golden.close(joint(out), "sequence_output", real(golden))
    golden.close(out.pooled_text, "pooled_output")
    golden.close(model.fuse(text, None).text, "text_only_sequence_output", i["input_mask"])


def test_regions_named_by_words(golden, model):
    out = run(model, golden, words=golden.inputs["image_text_alignment"])
    golden.close(joint(out), "aligned_sequence_output", real(golden))
    golden.close(out.pooled_text, "aligned_pooled_output")


def test_pretraining(golden, model):
    out, masked, i = run(model, golden), run(model, golden, "masked_input_ids"), golden.inputs
    table = model.text.words.weight
    golden.close(model.heads["mlm"](joint(out), table), "mlm_logits", real(golden))  # recorded on the intact text
    golden.close(model.heads["match"](out.pooled_text), "nsp_logits")
    words = masked_words(model.heads["mlm"](masked.text, table), i["masked_lm_labels"])
    golden.close(words, "masked_lm_loss")
    pair = F.cross_entropy(model.heads["match"](masked.pooled_text), i["is_random_next"])
    golden.close(pair, "next_sentence_loss")
    golden.close(words + pair, "loss")


def test_answers(golden):
    c, i = golden.config, golden.inputs
    model = with_head(golden, "weights.vqa", answers={"kind": "linear", "labels": c["vqa_num_labels"], "dropout": 0.1})
    states = visual_bert.answer_states(run(model, golden, "vqa_input_ids").text, i["input_mask"])
    logits = model.heads["answers"](states)
    golden.close(logits.unsqueeze(1), "vqa_logits")
    golden.close(F.kl_div(logits.log_softmax(-1), i["vqa_label"], reduction="batchmean"), "vqa_loss")


def test_two_pictures(golden):
    model = with_head(golden, "weights.nlvr", answers={"kind": "linear", "labels": 2, "dropout": 0.1})
    logits = model.heads["answers"](run(model, golden, types=golden.inputs["nlvr_visual_embeddings_type"]).pooled_text)
    golden.close(logits, "nlvr_logits")
    golden.close(F.cross_entropy(logits, golden.inputs["nlvr_label"]), "nlvr_loss")


def test_phrases_in_pictures(golden):
    c, i = golden.config, golden.inputs
    size = c["hidden_size"] // c["num_attention_heads"]
    model = with_head(golden, "weights.flickr", ground={"kind": "visual_bert_grounding", "size": size})
    out, at = run(model, golden), i["flickr_position"]
    words = out.text.gather(1, at.clamp(min=0).unsqueeze(-1).expand(-1, -1, out.text.shape[-1]))
    scores = model.heads["ground"](words, out.image, i["image_mask"])
    golden.close(scores, "flickr_scores", (at >= 0).unsqueeze(-1) & i["image_mask"].bool().unsqueeze(1))
    loss = F.kl_div(scores.log_softmax(-1), i["flickr_label"], reduction="batchmean")
    golden.close(loss, "flickr_loss")


def test_names_of_the_release_both_ways(golden, model):
    back = save_foreign(model, visual_bert.KEYS, prefix="bert.")
    assert set(back) == {f"bert.{name}" for name in golden.weights}
    again = build(golden.config, visual_bert.heads(golden.config["vocab_size"]))
    load_foreign(again, back, visual_bert.KEYS, prefix="bert.")
    for name, value in save_foreign(again, visual_bert.KEYS).items():
        assert torch.equal(value, golden.weights[name]), name


def test_transformers_pretraining(golden, model):
    c, i = golden.config, golden.inputs
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
             "max_position_embeddings", "type_vocab_size", "visual_embedding_dim")  # fmt: skip
    theirs = VisualBertForPreTraining(VisualBertConfig(**{name: c[name] for name in names})).eval()
    theirs.load_state_dict(save_foreign(model, visual_bert.HF_KEYS), strict=True)
    features = i["visual_embeddings"]
    types = torch.zeros(features.shape[:2], dtype=torch.long)
    expected = theirs(input_ids=i["input_ids"], attention_mask=i["input_mask"], token_type_ids=i["token_type_ids"],
                      visual_embeds=features, visual_attention_mask=i["image_mask"],
                      visual_token_type_ids=types, output_hidden_states=True)  # fmt: skip
    out = run(model, golden)
    keep = real(golden).bool()
    torch.testing.assert_close(joint(out)[keep], expected.hidden_states[-1][keep], atol=2e-5, rtol=2e-5)
    words = model.heads["mlm"](joint(out), model.text.words.weight)
    torch.testing.assert_close(words[keep], expected.prediction_logits[keep], atol=2e-5, rtol=2e-5)
    match = model.heads["match"](out.pooled_text)
    torch.testing.assert_close(match, expected.seq_relationship_logits, atol=2e-5, rtol=2e-5)
    again = build(c, visual_bert.heads(c["vocab_size"]))
    load_foreign(again, theirs.state_dict(), visual_bert.HF_KEYS)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
