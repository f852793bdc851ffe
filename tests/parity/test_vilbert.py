"""ViLBERT and 12-in-1 against their recorded release."""

import pytest
import torch
from torch.nn import functional as F

from interlace.embed.regions import Regions
from interlace.embed.task_words import insert
from interlace.model import VLModel
from interlace.objectives.base import Views
from interlace.objectives.mlm import masked_words
from interlace.objectives.mvm import belief_losses, feature_losses
from interlace.objectives.vqa import VQA
from interlace.presets import vilbert
from interlace.streams import Streams, everyone
from interlace.weights import load_foreign, save_foreign

SYSTEM = "vilbert"
NEVER_USED = (".q_dense1", ".q_dense2")


def loaded(config, tensors):
    model = VLModel(config).eval()
    report = load_foreign(model, tensors, vilbert.keys(config.segments))
    assert all(any(never in name for never in NEVER_USED) for name in report.dropped) and not report.fresh
    return model


@pytest.fixture(scope="module")
def model(golden):
    return loaded(vilbert.from_release(golden.config), golden.weights)


@pytest.fixture(scope="module")
def inputs(golden):
    """As the model takes them, with these words and features."""

    def inputs(ids="input_ids", features="image_feat"):
        i = golden.inputs
        return {"input_ids": i[ids], "pixel_values": Regions(i[features], i["image_loc"]),
                "attention_mask": i["attention_mask"], "image_mask": i["image_attention_mask"],
                "token_type_ids": i["token_type_ids"]}  # fmt: skip

    return inputs


@pytest.fixture(scope="module")
def real(golden):
    return golden.inputs["attention_mask"], golden.inputs["image_attention_mask"]


def test_states_after_each_co_attention(golden, model, inputs, real):
    i = inputs()
    streams = Streams(model.text(i["input_ids"], type_ids=i["token_type_ids"]), model.image(i["pixel_values"]))
    crossings = [n for n, layer in enumerate(model.schedule.layers()) if layer.crosses]
    assert len(crossings) == len(golden.config["t_biattention_id"])
    for n, at in enumerate(crossings):
        out = model.schedule.run(streams, everyone(*real), stop=at + 1)
        golden.close(out.text, f"text_after_connection_{n}", real[0])
        golden.close(out.image, f"image_after_connection_{n}", real[1])


def test_states_and_pooled(golden, model, inputs, real):
    out = model(**inputs())
    golden.close(out.text, "text_sequence_output", real[0])
    golden.close(out.image, "image_sequence_output", real[1])
    golden.close(out.pooled_text, "pooled_text")
    golden.close(out.pooled_image, "pooled_image")


def test_heads(golden, model, inputs, real):
    out, heads = model(**inputs()), model.heads
    golden.close(heads["mlm"](out.text, model.text.words.weight), "mlm_logits", real[0])
    golden.close(heads["mrc"](None, out.image), "region_logits", real[1])
    golden.close(heads["match"](out.pooled_text, out.pooled_image).flip(-1), "nsp_logits")  # there 0 = match


def test_losses(golden, model, inputs):
    i, heads = golden.inputs, model.heads
    out = model(**inputs("masked_input_ids", "masked_image_feat"))
    words = masked_words(heads["mlm"](out.text, model.text.words.weight), i["masked_lm_labels"])
    golden.close(words[None], "masked_lm_loss")
    hidden = i["image_label"] == 1
    guessed = heads["mrc"](None, out.image[:, 1:])  # the whole picture is never hidden
    beliefs = belief_losses(guessed[hidden], i["image_target"][hidden]).sum(-1).mean()
    golden.close(beliefs[None], "masked_region_kl_loss")
    matched = F.cross_entropy(heads["match"](out.pooled_text, out.pooled_image), 1 - i["next_sentence_label"])
    golden.close(matched[None], "next_sentence_loss")


def test_loss_of_a_model_that_guesses_features(golden, inputs):
    config = vilbert.from_release(golden.config | {"v_target_size": golden.config["v_feature_size"]})
    model = loaded(config, golden.weights | golden.part("weights.vt1"))
    out, hidden = model(**inputs("masked_input_ids", "masked_image_feat")), golden.inputs["image_label"] == 1
    guessed = model.heads["mrc"](None, out.image[:, 1:])
    loss = feature_losses(guessed[hidden], golden.inputs["image_feat"][:, 1:][hidden]).mean()
    golden.close(loss[None], "vt1_masked_region_mse_loss")


def test_names_of_the_release_both_ways(golden, model):
    back = save_foreign(model, vilbert.keys(model.config.segments))
    used = {name for name in golden.weights if not any(never in name for never in NEVER_USED)}
    assert set(back) == used
    for name in used:
        assert torch.equal(back[name], golden.weights[name]), name


# ---------------------------------------------------------------------------------------------------------- 12-in-1


@pytest.fixture(scope="module")
def twelve(golden):
    c, tasks = golden.config, golden.part("weights.tasks")
    rows = len(tasks["bert.embeddings.task_embeddings.weight"])
    config = vilbert.from_release(c, tasks=rows, vqa=c["vqa_num_labels"], gqa=c["gqa_num_labels"])
    return loaded(config, golden.weights | tasks)


@pytest.fixture(scope="module")
def asked(golden, twelve, inputs):
    """Inputs with a task token, of these rows of the recorded ones."""

    def asked(text=slice(None), image=slice(None)):
        i = inputs()
        regions = Regions(*(x[image] for x in i["pixel_values"][:2]))
        ids = twelve.config.text.with_task(i["input_ids"][text], golden.inputs["task_ids"][text, 0])
        mask, types = insert(i["attention_mask"][text], 1), insert(i["token_type_ids"][text], 0)
        return {"input_ids": ids, "pixel_values": regions, "attention_mask": mask, "token_type_ids": types,
                "image_mask": i["image_mask"][image]}  # fmt: skip

    return asked


def test_states_with_a_task(golden, twelve, asked):
    i = asked()
    out = twelve(**i)
    golden.close(out.text, "tasks_text_sequence_output", i["attention_mask"])
    golden.close(out.image, "tasks_image_sequence_output", i["image_mask"])
    golden.close(out.pooled_text, "tasks_pooled_text")
    golden.close(out.pooled_image, "tasks_pooled_image")


def test_heads_of_tasks(golden, twelve, asked):
    i = asked()
    out, heads = twelve(**i), twelve.heads
    pooled = out.pooled_text, out.pooled_image
    golden.close(heads["answers"](*pooled), "tasks_vil_prediction")
    golden.close(heads["answers_gqa"](*pooled), "tasks_vil_prediction_gqa")
    golden.close(heads["rank"](*pooled), "tasks_vil_logit")
    golden.close(heads["entail"](*pooled), "tasks_vil_tri_prediction")
    odd = len(i["input_ids"]) % 2  # no pairs of pictures: the release then says whether they match
    binary = heads["match"](*pooled).flip(-1) if odd else heads["nlvr2"](*pooled)
    golden.close(binary, "tasks_vil_binary_prediction")
    golden.close(heads["mrc"](None, out.image), "tasks_vision_prediction", i["image_mask"])
    golden.close(heads["refer"](None, out.image), "tasks_vision_logit", i["image_mask"])
    golden.close(heads["mlm"](out.text, twelve.text.words.weight), "tasks_linguisic_prediction", i["attention_mask"])
    golden.close(heads["refer_word"](out.text), "tasks_linguisic_logit", i["attention_mask"])


def test_two_pictures_of_one_text(golden, twelve, asked):
    out = twelve(**asked(golden.inputs["tasks4_text_rows"], golden.inputs["tasks4_image_rows"]))
    golden.close(twelve.heads["nlvr2"](out.pooled_text, out.pooled_image), "tasks4_vil_binary_prediction")


def test_vqa_loss(golden, twelve, asked):
    i, target = asked(), golden.inputs["vqa_targets"]
    question = twelve.half_text(i["input_ids"], i["attention_mask"], i["token_type_ids"])
    views = Views(twelve, {"answer_scores": target, "question_real": torch.ones(len(target), dtype=torch.bool)})
    # the recorded question has token types, which a batch has not
    views._halves = {"question": question, "image": twelve.half_image(i["pixel_values"], i["image_mask"])}
    golden.close(VQA().loss(twelve, views.batch, views).loss, "tasks_vqa_loss")
