"""BLIP: every recorded output of the original release, under its own names."""

import pytest
import torch
from torch.nn import functional as F

from interlace import generate
from interlace.layers import Width
from interlace.model import Half, VLModel
from interlace.objectives.lm import answers_loss, next_word, written
from interlace.objectives.momentum import Momentum, soft_contrast
from interlace.presets import blip
from interlace.weights import load_foreign, save_foreign

SYSTEM = "blip"
TRAINING = {"visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m",
            "image_queue", "text_queue", "queue_ptr"}  # fmt: skip


def config(golden, make=blip.blip, **changes):
    m, v, ids = golden.config["med_config"], golden.config["vision"], golden.config["special_ids"]
    text = Width(m["hidden_size"], heads=m["num_attention_heads"], ffn=m["intermediate_size"], eps=m["layer_norm_eps"])
    image = Width(v["embed_dim"], heads=v["num_heads"], ffn=int(v["mlp_ratio"] * v["embed_dim"]), norm="pre",
                  eps=v["norm_eps"], dropout=0.0, attention_dropout=0.0)  # fmt: skip
    words = {"vocabulary": m["vocab_size"], "positions": m["max_position_embeddings"], "pad": ids["pad"]}
    return make(text=text, image=image, layers=(m["num_hidden_layers"], v["depth"]), pixels=v["img_size"],
                patch=v["patch_size"], words=words, ends=(ids["bos_DEC"], ids["sep"]), **changes)  # fmt: skip


@pytest.fixture(scope="module")
def model(golden):
    heads = {"contrast": blip.CONTRAST | {"size": golden.config["embed_dim"]}, "match": blip.MATCH}
    model = VLModel(config(golden, heads=heads)).eval()
    report = load_foreign(model, golden.weights, blip.KEYS)
    dropped = {name.split(".")[0] for name in report.dropped if not name.endswith("position_ids")}
    assert dropped == TRAINING and not report.fresh
    return model


@pytest.fixture(scope="module")
def vqa(golden):
    model = VLModel(config(golden, blip.blip_vqa)).eval()
    encoders = {k: v for k, v in golden.weights.items() if k.split(".")[0] in ("visual_encoder", "text_encoder")}
    load_foreign(model, encoders | golden.part("weights.vqa"), blip.VQA_KEYS)
    return model


def starting(golden, what):
    ids = golden.inputs["input_ids"].clone()
    ids[:, 0] = golden.config["special_ids"][what]
    return ids


@pytest.fixture(scope="module")
def image(golden, model):
    return model.half_image(golden.inputs["image"])


def test_the_encoders(golden, model, image):
    mask = golden.inputs["attention_mask"]
    alone = model.fuse(model.half_text(golden.inputs["input_ids"], mask), None)
    fused = model.fuse(model.half_text(starting(golden, "enc_ENC"), mask), image)
    golden.close(image.states, "image_embeds")
    golden.close(alone.text, "text_hidden", mask)
    golden.close(fused.text, "multimodal_hidden", mask)
    golden.close(model.heads["match"](fused.pooled_text), "itm_logits_enc")


def test_contrast(golden, model):
    ids, mask = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    text, image = model.encode_text(ids, mask), model.encode_image(golden.inputs["image"])
    golden.close(text, "text_feat")
    golden.close(image, "image_feat")
    golden.close(image @ text.T, "itm_model_itc_sim")


def test_the_evaluation_model_keeps_cls(golden):
    heads = {"contrast": blip.CONTRAST | {"size": golden.config["embed_dim"]}, "match": blip.MATCH}
    model = VLModel(config(golden, blip.blip_retrieval, heads=heads)).eval()
    load_foreign(model, golden.weights, blip.RETRIEVAL_KEYS)
    out = model(golden.inputs["input_ids"], golden.inputs["image"], golden.inputs["attention_mask"])
    golden.close(model.heads["match"](out.pooled_text), "itm_model_itm_logits")


def test_the_decoder(golden, model, image):
    ids, prompt = starting(golden, "bos_DEC"), len(golden.inputs["caption_prompt_ids"])
    logits = model.decoder(ids, image.states).logits
    golden.close(logits, "lm_logits", golden.inputs["attention_mask"])
    golden.close(next_word(logits, written(ids)), "lm_loss")
    golden.close(next_word(logits, written(ids)), "pretrain_loss_lm")
    captions = golden.inputs["caption_input_ids"]
    logits = model.decoder(captions, image.states).logits
    golden.close(next_word(logits, written(captions, prompt=prompt)), "caption_loss")


def equal_texts(golden, ours, name):
    """Ids up to and including the first [SEP]."""
    end, theirs = golden.config["special_ids"]["sep"], golden.outputs[name]
    assert len(ours) == len(theirs)
    for mine, other in zip(ours.tolist(), theirs.tolist()):
        cut = lambda ids: ids[: ids.index(end) + 1] if end in ids else ids  # noqa: E731
        assert cut(mine) == cut(other), name


@pytest.mark.parametrize("cached", [True, False])
def test_captions(golden, model, cached):
    given = (model, golden.inputs["image"], golden.inputs["caption_prompt_ids"])
    greedy = generate.caption(*given, beams=1, use_cache=cached)
    three = generate.caption(*given, use_cache=cached)
    other = generate.caption(*given, max_length=16, min_length=4, repetition_penalty=1.3, use_cache=cached)
    equal_texts(golden, greedy, "caption_greedy_ids")
    equal_texts(golden, three, "caption_beam3_ids")
    equal_texts(golden, other, "caption_beam3_rep_ids")


def test_captions_of_the_model_that_only_writes(golden):
    model = VLModel(config(golden, blip.blip_caption)).eval()
    weights = {k: v for k, v in golden.weights.items() if k.split(".")[0] in ("visual_encoder", "text_decoder")}
    load_foreign(model, weights, blip.CAPTION_KEYS)
    three = generate.caption(model, golden.inputs["image"], golden.inputs["caption_prompt_ids"])
    equal_texts(golden, three, "caption_beam3_ids")


def asked(golden, vqa):
    return generate.ask(vqa, starting(golden, "enc_ENC"), golden.inputs["attention_mask"], golden.inputs["image"])


def test_answers_in_training(golden, vqa):
    question, counts = asked(golden, vqa), golden.inputs["answer_count"]
    many = question.rows(torch.arange(len(counts)).repeat_interleave(counts))
    ids = golden.inputs["answer_ids"]
    logits = vqa.decoder(ids, many.states, many.mask).logits
    loss = answers_loss(logits, written(ids), golden.inputs["answer_weight"], len(counts))
    golden.close(loss, "vqa_loss")


def test_answers_ranked(golden, vqa):
    question, answers = asked(golden, vqa), golden.inputs["answer_ids"]
    k = golden.outputs["vqa_rank_topk_ids"].shape[1]
    kept, scores = generate.rank_answers(vqa, question, answers, k)
    start = answers[:1, :1].expand(len(question.states), 1)
    golden.close(vqa.decoder(start, question.states, question.mask).logits[:, 0], "vqa_rank_first_logits")
    golden.close(kept, "vqa_rank_topk_ids")
    golden.close(scores, "vqa_rank_scores")
    golden.close(kept.gather(1, scores.argmax(1, keepdim=True))[:, 0], "vqa_rank_best")


@pytest.mark.parametrize("cached", [True, False])
def test_answers_written(golden, vqa, cached):
    read = Half(asked(golden, vqa).states, None)  # the release reads the padding of questions, too
    equal_texts(golden, generate.answer(vqa, read, use_cache=cached), "vqa_generate_ids")


def test_contrast_with_momentum(golden, model):
    slow = Momentum(model, golden.config["queue_size"], golden.config["momentum"])
    weights = {k: v for k, v in golden.weights.items() if k.split(".")[0].endswith("_m")}
    load_foreign(slow.model.eval(), weights, blip.MOMENTUM_KEYS, fresh=("heads.contrast.temperature",))
    slow.text.copy_(golden.weights["text_queue"])
    slow.image.copy_(golden.weights["image_queue"])
    slow.at.copy_(golden.weights["queue_ptr"])
    ids, mask, pixels = (golden.inputs[name] for name in ("input_ids", "attention_mask", "image"))
    slow.follow(model)
    text, slow_text = (m.encode_text(ids, mask) for m in (model, slow.model))
    image, slow_image = (m.encode_image(pixels) for m in (model, slow.model))
    loss, _, _ = soft_contrast(text, image, slow_text, slow_image, slow.text, slow.image,
                               model.heads["contrast"].scale, golden.config["alpha"])  # fmt: skip
    slow.push(slow_text, slow_image)
    golden.close(loss, "pretrain_loss_ita")
    golden.close(slow.text, "pretrain_text_queue_after")
    golden.close(slow.image, "pretrain_image_queue_after")
    golden.close(slow.at, "pretrain_queue_ptr_after")


def test_matching_with_the_negatives_given(golden, model, image):
    text = model.half_text(starting(golden, "enc_ENC"), golden.inputs["attention_mask"])
    rows = torch.arange(len(text.states))
    texts = torch.cat([rows, rows, golden.inputs["pretrain_neg_text_for_image"]])
    images = torch.cat([rows, golden.inputs["pretrain_neg_image_for_text"], rows])
    logits = model.heads["match"](model.fuse(text.rows(texts), image.rows(images)).pooled_text)
    golden.close(F.cross_entropy(logits, (torch.arange(len(texts)) < len(rows)).long()), "pretrain_loss_itm")


def test_the_names_read_backwards(golden, model, vqa):
    back = save_foreign(model, blip.KEYS)
    for name, value in back.items():
        assert torch.equal(value, golden.weights[name]), name
    left = {name for name in set(golden.weights) - set(back) if not name.endswith("position_ids")}
    assert {name.split(".")[0] for name in left} == TRAINING
    theirs = golden.part("weights.vqa")
    back = save_foreign(vqa, blip.VQA_KEYS)
    for name, value in theirs.items():
        assert name.endswith("position_ids") or torch.equal(back[name], value), name
