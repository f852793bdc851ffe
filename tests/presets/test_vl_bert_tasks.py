"""VL-BERT pointing at regions (RefCOCO+) and choosing among answers (VCR)."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from interlace.convert import convert
from interlace.embed.regions import Regions
from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import vl_bert
from interlace.weights import save_foreign
from tests.boxes import ordered

GOLDEN = Path(__file__).parents[1] / "parity/golden"


def awake(model):
    """As if it had learnt: the visual norms start at zero, where no picture is heard, and attention small."""
    for norm in (model.image.norm, model.schedule.meet[0].norm_picture):
        torch.nn.init.normal_(norm.weight)
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        torch.nn.init.normal_(linear.weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def pointer():
    torch.manual_seed(0)
    return awake(VLModel(vl_bert.vl_bert_refcoco(vl_bert.tiny)))


@pytest.fixture(scope="module")
def chooser():
    torch.manual_seed(0)
    return awake(VLModel(vl_bert.vl_bert_vcr(vl_bert.tiny)))


def inputs(texts, pictures, regions=6):
    """Texts of 7 words, the first of 5; pictures of `regions`, the first of two less."""
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(1, 99, (texts, 7), generator=g), torch.ones(texts, 7, dtype=torch.long)
    mask[0, 5:] = 0
    features = torch.randn(pictures, regions, 20, generator=g)
    found = Regions(features, ordered(torch.rand(pictures, regions, 4, generator=g)))
    real = torch.ones(pictures, regions, dtype=torch.long)
    real[0, -2:] = 0
    return ids, mask, found, real


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


# ---------------------------------------------------------------------------------------------------------- RefCOCO+


def test_regions_are_scored_by_the_formula(pointer):
    """w1 gelu(W0 h + b0) + b1 of each region's state h, the whole picture's first, and no score for padding."""
    ids, mask, found, real = inputs(2, 2)
    said = vl_bert.point(pointer, pointer.half_text(ids, mask), pointer.half_image(found, real))
    w = pointer.heads["refer"].state_dict()
    states = pointer(ids, found, mask, real).image
    assert said.shape == (2, 6) and states.shape[1] == 7  # [END] stands before the regions
    for row in range(2):
        for region in range(6):
            x = w["dense.weight"] @ states[row, 1 + region] + w["dense.bias"]
            expected = w["out.weight"][0] @ gelu(x) + w["out.bias"][0] if real[row, region] else torch.tensor(-1e4)
            torch.testing.assert_close(said[row, region], expected, atol=1e-5, rtol=1e-4)


def test_regions_in_another_order_have_the_same_scores(pointer):
    ids, mask, found, real = inputs(2, 2)
    order = [0, 3, 2, 1, 5, 4]  # the whole picture stays the first
    text = pointer.half_text(ids, mask)
    said = vl_bert.point(pointer, text, pointer.half_image(found, real))
    turned = Regions(found.features[:, order], found.boxes[:, order])
    again = vl_bert.point(pointer, text, pointer.half_image(turned, real[:, order]))
    torch.testing.assert_close(again, said[:, order], atol=1e-5, rtol=1e-4)
    assert said[1].std() > 1e-3  # they do differ


def test_what_padding_holds_changes_no_score(pointer):
    ids, mask, found, real = inputs(2, 2)
    text = pointer.half_text(ids, mask)
    other = found.features.masked_fill(~real.bool().unsqueeze(-1), 7.0)
    said = vl_bert.point(pointer, text, pointer.half_image(found, real))
    assert torch.equal(said, vl_bert.point(pointer, text, pointer.half_image(found._replace(features=other), real)))


def test_the_expression_moves_the_scores(pointer):
    ids, mask, found, real = inputs(2, 2)
    picture = pointer.half_image(found, real)
    said = vl_bert.point(pointer, pointer.half_text(ids, mask), picture)
    ids[1, 2] += 1
    other = vl_bert.point(pointer, pointer.half_text(ids, mask), picture)
    assert torch.equal(said[0], other[0]) and (said[1] - other[1]).abs().max() > 1e-3


UNREAD = ("schedule.meet.0.no_picture", "image.hidden_")  # of text alone, and of hidden regions


def test_the_gradient_of_scores_reaches_all_that_is_read(pointer):
    ids, mask, found, real = inputs(2, 2)
    pointer.zero_grad()
    said = vl_bert.point(pointer, pointer.half_text(ids, mask), pointer.half_image(found, real))
    F.binary_cross_entropy_with_logits(said[real.bool()], torch.rand(int(real.sum()))).backward()
    still = {name for name, p in pointer.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith(UNREAD) for name in still), still


def test_a_picture_for_each_expression(pointer, chooser):
    ids, mask, found, real = inputs(3, 2)
    text, picture = pointer.half_text(ids, mask), pointer.half_image(found, real)
    with pytest.raises(UserError, match=r"expected a picture for each expression, 3, and got 2: repeat"):
        vl_bert.point(pointer, text, picture)
    assert vl_bert.point(pointer, text, picture.rows(torch.tensor([0, 0, 1]))).shape == (3, 6)
    with pytest.raises(UserError, match=r"a head 'refer', and this one has choose, .*with vl_bert_refcoco\(\)"):
        vl_bert.point(chooser, text, picture)


# --------------------------------------------------------------------------------------------------------------- VCR


def answers(model, texts=8):
    """Four answers to each of two questions, and their types."""
    ids, mask, found, real = inputs(texts, 2)
    types = (torch.arange(7) > 3).long().expand(texts, 7)
    return ids, mask, types, found, real, model.half_text(ids, mask, types), model.half_image(found, real)


def test_answers_are_scored_by_the_formula(chooser):
    """w tanh(Wp h + bp) + b of the first word's state h, a pass for each answer with its own picture."""
    ids, mask, types, found, real, texts, pictures = answers(chooser)
    said = vl_bert.choose(chooser, texts, pictures)
    pool, w = chooser.poolers["text"].state_dict(), chooser.heads["choose"].state_dict()
    assert said.shape == (2, 4)
    for row in range(8):
        one = row // 4
        own = Regions(found.features[[one]], found.boxes[[one]])
        state = chooser(ids[[row]], own, mask[[row]], real[[one]], types[[row]]).text[0, 0]
        pooled = torch.tanh(pool["dense.weight"] @ state + pool["dense.bias"])
        expected = w["out.weight"][0] @ pooled + w["out.bias"][0]
        torch.testing.assert_close(said[one, row % 4], expected, atol=1e-5, rtol=1e-4)


def test_answers_know_nothing_of_each_other_but_have_their_order(chooser):
    texts, pictures = answers(chooser)[-2:]
    said = vl_bert.choose(chooser, texts, pictures)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    again = vl_bert.choose(chooser, texts.rows(order), pictures)
    torch.testing.assert_close(again, torch.stack([said[0, order[:4]], said[1]]), atol=1e-5, rtol=1e-4)
    assert said[0].std() > 1e-3
    two = vl_bert.choose(chooser, texts, pictures.rows(torch.tensor([0, 0, 1, 1])), choices=2)
    torch.testing.assert_close(two.view(2, 4), said, atol=1e-5, rtol=1e-4)


def test_each_question_has_its_own_picture(chooser):
    texts, pictures = answers(chooser)[-2:]
    said = vl_bert.choose(chooser, texts, pictures)
    other = vl_bert.choose(chooser, texts, pictures.rows(torch.tensor([0, 0])))
    torch.testing.assert_close(other[0], said[0])
    assert (other[1] - said[1]).abs().max() > 1e-3


def test_the_gradient_of_answers_reaches_all_that_is_read(chooser):
    texts, pictures = answers(chooser)[-2:]
    chooser.zero_grad()
    right = F.one_hot(torch.tensor([1, 3]), 4).float()
    F.binary_cross_entropy_with_logits(vl_bert.choose(chooser, texts, pictures), right).backward()
    still = {name for name, p in chooser.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith((*UNREAD, "heads.objects.")) for name in still), still


def test_another_number_of_answers_is_explained(chooser, pointer):
    texts, pictures = answers(chooser)[-2:]
    with pytest.raises(UserError, match=r"expected 4 answers for each picture, 8 for 2, and got 7: give all answers"):
        vl_bert.choose(chooser, texts.rows(torch.arange(7)), pictures)
    with pytest.raises(UserError, match=r"a head 'choose', and this one has refer: .*with vl_bert_vcr\(\)"):
        vl_bert.choose(pointer, texts, pictures)


# ----------------------------------------------------------------------------------------------------- release, saving


def released(task):
    """A file as the release's code for the task writes it: the body, recorded at a small size, without what only
    pre-training has, and (a little of) the network that was trained along, but for VQA."""
    tensors = load_file(GOLDEN / "vlbert-a.safetensors")
    pretraining = ("aux_text", "object_mask", "vlbert.mlm_head", "vlbert.mvrc_head")
    body = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    body = {k: v for k, v in body.items() if not k.startswith(pretraining)}
    size, g = len(body["vlbert.embedding_LayerNorm.bias"]), torch.Generator().manual_seed(2)
    pooler = {"vlbert.pooler.dense.weight": (size, size), "vlbert.pooler.dense.bias": (size,)}
    linears = {"vqa": {"final_mlp.0.dense": size, "final_mlp.2": 17},
               "refcoco": {"final_mlp.0.dense": size, "final_mlp.2": 1},
               "vcr": {"final_mlp.1": 1, "cnn_loss_reg.0.dense": size, "cnn_loss_reg.2": 81}}[task]  # fmt: skip
    norm = {"final_mlp.0.LayerNorm.weight": (size,), "final_mlp.0.LayerNorm.bias": (size,)}
    shapes = {"vqa": norm, "refcoco": {}, "vcr": pooler}[task]
    for name, out in linears.items():
        shapes |= {f"{name}.weight": (out, size), f"{name}.bias": (out,)}
    body |= {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if task == "vqa":
        return body, {}
    if task == "vcr":
        body = {k.replace("vlbert.", "vlbert._module.", 1): v for k, v in body.items()}
    resnet = {f"image_feature_extractor.{name}": torch.zeros(2) for name in (
        "backbone.conv1.weight", "backbone.layer1.0.bn1.running_mean", "roi_head_feature_extractor.0.conv1.weight",
        "head.0.0.conv1.weight")}  # fmt: skip
    resnet["image_feature_extractor.backbone.bn1.num_batches_tracked"] = torch.tensor(3)
    return body, resnet


TASKS = {"vqa": ("vl_bert", ["answers"], vl_bert.KEYS),
         "refcoco": ("vl_bert_refcoco", ["refer"], vl_bert.REFCOCO_KEYS),
         "vcr": ("vl_bert_vcr", ["choose", "objects"], vl_bert.VCR_KEYS)}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_release_fine_tuned(task, tmp_path):
    body, resnet = released(task)
    named = {f"module.{name}": tensor for name, tensor in (body | resnet).items()}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "best.model")
    config = json.loads((GOLDEN / "vlbert-a.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, heads, keys = TASKS[task]
    done = convert(tmp_path / "best.model", tmp_path / "ours", name, Console(quiet=True))
    assert list(done.model.heads) == heads and ("text" in done.model.poolers) == (task == "vcr")
    assert set(done.report.mapped) == {f"module.{name}" for name in body}
    assert set(done.report.dropped) == {f"module.{name}" for name in resnet}
    assert set(done.report.fresh) == set(vl_bert.UNTUNED)
    back = save_foreign(done.model, keys)
    assert all(torch.equal(back[name], tensor) for name, tensor in body.items())
    further = {theirs for theirs, ours in keys.items() if ours in (*vl_bert.UNTUNED, "text.words.weight")}
    assert set(back) == set(body) | further


def test_a_file_of_pretraining_may_not_lack_what_pretraining_reads(tmp_path):
    tensors = load_file(GOLDEN / "vlbert-a.safetensors")
    body = {k.removeprefix("weights/"): v.clone() for k, v in tensors.items() if k.startswith("weights/")}
    del body["aux_text_visual_embedding.weight"]
    torch.save(body, tmp_path / "prec.model")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((GOLDEN / "vlbert-a.json").read_text())["config"]))
    with pytest.raises(UserError, match=r"Not in the file \(1 tensors of the model\): schedule\.meet\.0\.no_picture"):
        convert(tmp_path / "prec.model", tmp_path / "ours", "vl_bert", Console(quiet=True))


def test_saved_models_say_the_same(pointer, chooser, tmp_path):
    ids, mask, found, real = inputs(2, 2)
    pointer.save_pretrained(tmp_path / "pointer")
    chooser.save_pretrained(tmp_path / "chooser")
    again = VLModel.from_pretrained(tmp_path / "pointer").eval()
    with torch.no_grad():
        said = [vl_bert.point(m, m.half_text(ids, mask), m.half_image(found, real)) for m in (pointer, again)]
        assert torch.equal(*said)
        again = VLModel.from_pretrained(tmp_path / "chooser").eval()
        assert torch.equal(*[vl_bert.choose(m, *answers(m)[-2:]) for m in (chooser, again)])
