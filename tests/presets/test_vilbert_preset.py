"""ViLBERT and 12-in-1: the release's configuration, tasks, and what holds of 12-in-1 as of every preset."""

import pytest
import torch

from interlace.embed.regions import Regions
from interlace.embed.task_words import TaskWords, insert
from interlace.errors import UserError
from interlace.layers import BOTH, IMAGE, TEXT, Width, co
from interlace.model import VLModel
from interlace.presets import vilbert
from tests.boxes import ordered


def inputs():
    g = torch.Generator().manual_seed(0)
    regions = Regions(torch.randn(2, 5, 20, generator=g), ordered(torch.rand(2, 5, 5, generator=g)))
    return torch.randint(1, 99, (2, 7), generator=g), regions


def tiny_twelve():
    words = TaskWords(Width(32, heads=4), pool="relu", pool_size=48, vocabulary=99, positions=24, tasks=4)
    tiny = vilbert.tiny()
    return vilbert.twelve_in_one(words, vqa=7, gqa=5, image=tiny.image, segments=tiny.segments, classes=11)


@pytest.fixture
def twelve():
    torch.manual_seed(0)
    return VLModel(tiny_twelve()).eval()


def test_the_release_s_configuration_file_gives_the_base_model():
    released = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "hidden_act": "gelu", "intermediate_size": 3072, "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "type_vocab_size": 2,
                "v_feature_size": 2048, "v_hidden_size": 1024, "v_num_hidden_layers": 6, "v_num_attention_heads": 8,
                "v_intermediate_size": 1024, "v_attention_probs_dropout_prob": 0.1, "v_hidden_act": "gelu",
                "v_hidden_dropout_prob": 0.1, "v_biattention_id": [0, 1, 2, 3, 4, 5],
                "t_biattention_id": [6, 7, 8, 9, 10, 11], "v_target_size": 1601, "bi_hidden_size": 1024,
                "bi_num_attention_heads": 8}  # fmt: skip
    assert vilbert.from_release(released).to_dict() == vilbert.vilbert().to_dict()
    assert vilbert.from_release(released, tasks=20).to_dict() == vilbert.twelve_in_one().to_dict()
    with pytest.raises(UserError, match="fusion_method, 'sum'"):
        vilbert.from_release(released | {"fusion_method": "sum"})
    few = released | {"v_num_hidden_layers": 2, "v_biattention_id": [0, 1], "t_biattention_id": [10, 11]}
    assert vilbert.from_release(few).to_dict() == vilbert.vilbert(connections=2).to_dict()
    other = few | {"num_hidden_layers": 6, "v_num_hidden_layers": 4, "v_biattention_id": [1, 2]}
    segments = vilbert.from_release(other | {"t_biattention_id": [2, 4]}).segments
    meet = co(inner=1024, heads=8)
    assert segments == {"text": [BOTH, TEXT], "cross": [meet, BOTH, TEXT, meet, BOTH, BOTH]}
    names = vilbert.keys(segments)
    assert names["bert.encoder.layer.4.output.dense"] == "schedule.cross.4.text.ffn.down"
    assert names["bert.encoder.v_layer.3.output.dense"] == "schedule.cross.5.image.ffn.down"
    assert vilbert.keys({"text": [IMAGE]})["bert.encoder.v_layer.0.output.dense"] == "schedule.text.0.ffn.down"


def test_gradient_of_all_tasks_reaches_every_parameter():
    torch.manual_seed(0)
    model = VLModel(tiny_twelve())
    ids, regions = inputs()
    ids = model.config.text.with_task(ids, torch.tensor([0, 3]))
    out = model(ids, regions)
    states = {"mlm": (out.text, model.text.words.weight), "mrc": (None, out.image), "refer": (None, out.image),
              "refer_word": (out.text,)}  # fmt: skip
    answers = [head(*states.get(name, (out.pooled_text, out.pooled_image))) for name, head in model.heads.items()]
    sum(answer.square().sum() for answer in answers).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("attend.key.bias")] == []  # the softmax is blind to it


def test_save_and_load_change_nothing(twelve, tmp_path):
    model = twelve
    model.save_pretrained(tmp_path)
    again, (ids, regions) = VLModel.from_pretrained(tmp_path).eval(), inputs()
    assert again.config.segments == model.config.segments and again.config.text == model.config.text
    with torch.no_grad():
        a, b = model(ids, regions), again(ids, regions)
        expected = model.heads["match"](a.pooled_text, a.pooled_image)
        torch.testing.assert_close(again.heads["match"](b.pooled_text, b.pooled_image), expected)


def test_a_task_moves_no_word_and_changes_what_is_said(twelve):
    ids, regions = inputs()
    words = twelve.config.text
    asked = words.with_task(ids, torch.tensor([2, 2]))
    assert asked.shape == (2, 8) and (asked[:, 1] == 101).all() and torch.equal(asked[:, 2:], ids[:, 1:])
    assert insert(torch.ones(2, 7), 1).shape == (2, 8)
    with torch.no_grad():
        plain, with_task = twelve.text(ids), twelve.text(asked)
        torch.testing.assert_close(with_task[:, [0, *range(2, 8)]], plain)
        other = twelve(words.with_task(ids, torch.tensor([2, 3])), regions)
        same = twelve(asked, regions)
    assert torch.equal(other.pooled_text[0], same.pooled_text[0])
    assert not torch.allclose(other.pooled_text[1], same.pooled_text[1])


def test_a_task_needs_no_position_and_too_long_a_text_is_explained(twelve):
    ids = twelve.config.text.with_task(torch.ones(1, 24, dtype=torch.long), torch.tensor([0]))
    assert twelve.text(ids).shape == (1, 25, 32)
    with pytest.raises(UserError, match="a text of 25 tokens, but the model has 24 positions"):
        twelve.text(torch.ones(1, 25, dtype=torch.long))


def test_the_whole_picture_of_stored_regions_does_not_tell_what_is_hidden():
    torch.manual_seed(0)
    model = VLModel(vilbert.tiny()).eval()
    g = torch.Generator().manual_seed(1)
    others, boxes = torch.randn(2, 5, 20, generator=g), ordered(torch.rand(2, 6, 5, generator=g))
    mask, hidden = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 5] = False
    hidden[0, 2] = hidden[1, 1] = True

    def read(others, hide=True):
        real = mask[:, 1:, None]
        whole = (others * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)  # as the collator makes it
        regions = Regions(torch.cat([whole, others], 1), boxes)
        return model.half_image(regions, mask, hidden=hidden if hide else None).states[mask]

    other = others.clone()
    other[0, 1] += 1
    other[1, 0] += 1
    padded = others.clone()
    padded[1, 4] += 1
    with torch.no_grad():
        assert torch.allclose(read(others), read(other), atol=1e-6)
        assert torch.allclose(read(others), read(padded), atol=1e-6)
        assert (read(others, False)[0] - read(other, False)[0]).abs().max() > 1e-3
