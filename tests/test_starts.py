"""What a system starts from: layers spread over a tower's, quiet branches, words' frequencies, an aligned contrast."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from interlace.compose import Composition, compose
from interlace.data.batches import Collate, Samples
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.heads import Tied
from interlace.layers import Attend, FeedForward
from interlace.learner import Learner
from interlace.model import Half
from interlace.objectives import ITC, ITM, MLM, MRFR, Pass
from interlace.objectives.mvm import feature_table
from interlace.objectives.vqa_writes import GenerativeVQA
from interlace.presets import blip, uniter
from interlace.run import Run, save_run
from interlace.systems import build_from_run, build_system, spread
from interlace.train import train
from interlace.warm_start import align_contrast, projection_name, start_features, start_frequencies
from tests.conftest import toy_settings


@pytest.fixture(scope="module")
def source(shapes):
    return open_source(shapes)


@pytest.fixture(scope="module")
def made(text_tower, image_tower):
    def make(system: str, *objectives, **changes):
        parts = {"text": str(text_tower), "image": str(image_tower), **changes}
        what = Composition(system=system, width=32, heads=4, layers=2, size=64, dropout=0.0, max_length=16, **parts)
        torch.manual_seed(0)
        model, processor = build_system(what, list(objectives), None, Learner)
        return model.learn_by([Pass([(o, 1.0) for o in objectives])]), processor

    return make


def tower(layers: int) -> BertModel:
    torch.manual_seed(1)
    return BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
                                intermediate_size=64, max_position_embeddings=24))  # fmt: skip


@pytest.mark.parametrize("layers, chosen", [(6, [0, 5]), (2, [0, 1]), (1, [0])])
def test_layers_are_spread_from_the_first_to_the_last(layers, chosen):
    model, tensors = Learner(uniter.tiny()), tower(layers).state_dict()  # of two layers
    found = spread(model, tensors, uniter.start(model.config))
    name = "encoder.layer.{}.attention.self.query.weight"
    for n, from_ in enumerate(chosen):
        assert torch.equal(found[name.format(n)], tensors[name.format(from_)])
    assert name.format(len(chosen)) not in found
    assert torch.equal(found["embeddings.word_embeddings.weight"], tensors["embeddings.word_embeddings.weight"])


def test_branches_that_no_tower_starts_add_nothing_and_the_others_do(made):
    model, _ = made("blip", ITC(), ITM("drawn"))
    fuse = model.schedule.fuse[0]  # its self-attention is the tower's, reading the picture is new
    assert not fuse.attend_image.out.weight.any() and fuse.attend_self.out.weight.any() and fuse.ffn.down.weight.any()
    alone = model.schedule.image[0]
    parts = [part for part in alone.modules() if isinstance(part, Attend | FeedForward)]
    assert parts and not any((p.out if isinstance(p, Attend) else p.down).weight.any() for p in parts)


def test_word_heads_start_at_the_words_frequencies(made, source):
    model, processor = made("uniter", MLM())
    count = start_frequencies(model, source, processor)
    captions = [source.pair(int(row)).caption for row in source.indices("train")]
    assert count == len(captions)
    tokens = processor.tokens(captions)
    seen = torch.bincount(tokens["text_ids"][tokens["text_words"] >= 0], minlength=len(model.heads["mlm"].bias))
    bias = model.heads["mlm"].bias.detach()
    ends = torch.zeros_like(seen)
    ends[processor.tokenizer.sep_token_id] = len(captions)
    expected = (seen + ends + 1.0) / (seen + ends + 1.0).sum()
    torch.testing.assert_close(bias.softmax(0), expected.float(), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        model.heads["mlm"].bias.fill_(0.5)  # a head that has learnt is left alone
    start_frequencies(model, source, processor)
    assert (model.heads["mlm"].bias == 0.5).all()


def contrast_of(model, samples, collate):
    batch = collate([samples[(0, n)] for n in range(len(samples))])
    with torch.no_grad():
        model.eval()
        scored = model.objectives[0][0].loss(model, batch, _views(model, batch))
    return {name: float(value) for name, value in scored.logs.items()}


def _views(model, batch):
    from interlace.objectives.base import Views

    return Views(model, batch)


@pytest.mark.parametrize("system", ["uniter", "lxmert", "vilbert", "vilt", "blip"])
def test_an_aligned_contrast_finds_partners_before_it_has_learnt(system, made, source):
    model, processor = made(system, ITC(**({} if system == "blip" else {"size": 16})))  # BLIP brings its own
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    collate = Collate(processor, None, model.passes, model.cells_to_hide())
    before = contrast_of(model, samples, collate)
    was = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("heads.contrast.")}
    model.train()
    assert align_contrast(model, samples, collate, batch=32) is not None
    assert model.training and all(torch.equal(p, was[n]) for n, p in model.named_parameters() if n in was)
    after = contrast_of(model, samples, collate)
    assert after["itc_accuracy"] > before["itc_accuracy"] + 0.2


def test_pictures_that_all_look_alike_are_left_unaligned(made, source):
    model, processor = made("vl_bert", ITC(size=16))
    with torch.no_grad():
        for part in model.image.tower.parameters():  # pictures that say nothing
            part.zero_()
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    before = model.heads["contrast"].image.weight.clone()
    assert align_contrast(model, samples, Collate(processor, None, model.passes, model.cells_to_hide())) is None
    assert torch.equal(before, model.heads["contrast"].image.weight)


def test_what_a_contrast_over_whole_systems_reads_of_a_stream_alone(made):
    model, processor = made("lxmert", ITC(size=16))
    assert model.contrast.whole
    with torch.no_grad():
        for part in model.schedule.parameters():  # fresh branches are quiet, and would hide that layers are left out
            part += 0.05 * torch.randn_like(part)
    ids, mask = processor.texts(["a red circle", "a blue square on the left"])
    model.eval()
    with torch.no_grad():
        half, picture = model.half_text(ids, mask), model.half_image(pixels := torch.rand(2, 3, 64, 64))
        text, image = model.pooled_alone(half, "text"), model.pooled_alone(picture, "image")
        states = model.fuse(half, None).text
        said = model.image.states(model.normalise(pixels))
    for n, length in enumerate(mask.sum(1)):  # words at the end, without padding; the picture as the tower says it
        torch.testing.assert_close(text[n], states[n, :length].mean(0))
    torch.testing.assert_close(image, said.mean(1))


def test_a_contrast_reads_no_hidden_cells(made):
    model, _ = made("vl_bert", ITC(size=16), MRFR())
    said = torch.randn(2, model.config.image.cells, model.config.image.channels)
    hidden = torch.zeros(2, 1 + said.shape[1], dtype=torch.bool)  # the whole picture, which is made of cells, first
    hidden[0, [1, 4]] = True
    seen = model.half_from("image", said, hidden=hidden).features
    torch.testing.assert_close(seen[0], said[0, ~hidden[0, 1:]].mean(0))
    torch.testing.assert_close(seen[1], said[1].mean(0))


@pytest.mark.parametrize("system", ["uniter", "vilt"])  # tied to the projection of features, and a linear of its own
def test_a_head_of_features_starts_with_their_mean_and_learns(made, system):
    model, _ = made(system, MRFR())
    mean = torch.rand(model.config.image.channels)
    assert start_features(model, mean.numpy())
    head, said = model.heads["mrfr"], torch.randn(3, 32)
    tied = isinstance(head, Tied)
    guess = head(said, feature_table(model)) if tied else head(None, said)
    torch.testing.assert_close(guess, mean.expand_as(guess))
    guess.square().sum().backward()
    assert (head.norm if tied else head.out).weight.grad.any()
    assert not start_features(model, 2 * mean.numpy())  # what has learnt keeps what it learnt


def test_features_go_with_their_rows():
    halves = [Half(torch.randn(2, n, 3), None, torch.randn(2, 5)) for n in (4, 6)]
    both = halves[0].join(halves[1])
    assert torch.equal(both.features, torch.cat([h.features for h in halves])) and both.mask.sum() == 20
    assert torch.equal(both.rows(torch.tensor([3, 0])).features, both.features[[3, 0]])


def test_pictures_without_features_are_read_before_the_streams_meet(made):
    model, _ = made("mlim", ITC(size=16), image="patches")
    picture = model.half_image(torch.rand(2, 3, 64, 64))
    assert picture.features is None
    torch.testing.assert_close(model.pooled_alone(picture, "image"), picture.states.mean(1))


def test_what_all_vectors_have_in_common_does_not_reach_the_contrast(made, source, tmp_path):
    model, processor = made("uniter", ITC(size=16))
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    collate = Collate(processor, None, model.passes, model.cells_to_hide())
    align_contrast(model, samples, collate, batch=32)
    head = model.contrast.eval()
    batch = collate([samples[(0, n)] for n in range(len(samples))])
    with torch.no_grad():
        vectors = model.eval().pooled_alone(_views(model, batch).image(), "image")
    seen = []
    hook = head.image.register_forward_pre_hook(lambda part, given: seen.append(given[0]))
    head.project(vectors, "image")
    hook.remove()
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(seen[0].shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std(), torch.tensor(1.0), atol=0.02, rtol=0)
    save_run(tmp_path, model, processor, [], 1.0, name="run", system="uniter")
    again = Run.load(tmp_path).model.contrast  # and a saved one does the same
    torch.testing.assert_close(again.project(vectors, "image"), head.project(vectors, "image"))


@pytest.mark.parametrize("system", ["uniter", "vl_bert", "vilt", "blip"])
def test_a_system_reads_cells_averaged_to_a_coarser_grid(system, made):
    fine, _ = made(system)
    coarse, _ = made(system, grid=2)
    cells, pixels = fine.config.image.cells, torch.rand(2, 3, 64, 64)
    assert cells > 4 == coarse.config.image.cells and int(coarse.cells_to_hide().sum()) == 4
    with torch.no_grad():
        told, seen = coarse.image.states(pixels), fine.image.states(pixels)  # (2, 4, C), (2, cells, C)
        side = int(cells**0.5) // 2
        corner = seen.unflatten(1, (2 * side, 2 * side))[:, :side, :side].mean((1, 2))
        torch.testing.assert_close(told[:, 0], corner)
        half = coarse.half_image(pixels)
        assert half.states.shape[1] - fine.half_image(pixels).states.shape[1] == 4 - cells
    if hasattr(coarse.image, "boxes") and coarse.image.boxes.shape[-1]:  # each cell is a quarter of the picture
        first, last = coarse.image.boxes[-4, :4], coarse.image.boxes[-1, :4]
        torch.testing.assert_close(first, torch.tensor([0, 0, 0.5, 0.5]))
        torch.testing.assert_close(last, torch.tensor([0.5, 0.5, 1, 1]))
    with pytest.raises(UserError, match=r"model\.grid is 99, but"):
        made(system, grid=99)


def test_a_decoder_of_answers_starts_as_the_one_of_captions(made, tmp_path):
    from interlace.objectives import LM

    model, processor = made("blip", ITC(), ITM("drawn"), LM())
    with torch.no_grad():
        for part in model.parameters():
            part += 0.01 * torch.randn_like(part)
    save_run(tmp_path / "blip", model, processor, name="blip", system="blip")
    before = Run.load(tmp_path / "blip").model
    after, _ = build_from_run(Composition(start=str(tmp_path / "blip")), [GenerativeVQA()], None, Learner)
    assert after.config.writes.context == "text" and not after.config.writes.shares
    for layer, own, lent in zip(after.decoder.schedule.answer, before.decoder.schedule.write, before.schedule.fuse):
        assert torch.equal(layer.attend_self.query.weight, own.attend_self.query.weight)
        assert torch.equal(layer.ffn.up.weight, lent.ffn.up.weight)
        assert torch.equal(layer.attend_image.key.weight, lent.attend_image.key.weight)
    assert torch.equal(after.decoder.words.words.weight, before.text.words.weight)
    assert torch.equal(after.decoder.head.dense.weight, before.decoder.head.dense.weight)
    assert blip.answerer(before.config).start == before.config.writes.start


def test_without_a_run_the_decoder_of_answers_starts_as_the_text_tower(made):
    model, _ = made("blip", GenerativeVQA())
    assert model.config.writes.context == "text"
    first, fuse = model.decoder.schedule.answer[0], model.schedule.fuse[0]
    assert torch.equal(first.attend_self.query.weight, fuse.attend_self.query.weight)
    assert torch.equal(model.decoder.words.words.weight, model.text.words.weight)
    assert not first.attend_image.out.weight.any()  # no tower has read a question's states


def test_what_comes_with_a_run_learns_at_the_rate_of_what_started(made, tmp_path):
    model, processor = made("uniter", ITM("drawn"))
    save_run(tmp_path / "uniter", model, processor, name="uniter", system="uniter")
    after, _ = build_from_run(Composition(start=str(tmp_path / "uniter")), [ITC(size=16), ITM("drawn")], None, Learner)
    assert "heads.match.out.weight" in after.started and "heads.contrast" in after.anew
    assert not any(name.startswith("heads.contrast.") for name in after.started)
    assert np.isfinite([float(p.sum()) for p in after.parameters()]).all()


@pytest.mark.parametrize("system", ["", "mlim", "vilt"])
def test_patches_are_as_many_as_they_are(system, text_tower):
    what = Composition(system=system, text=str(text_tower), image="patches", width=32, heads=4, layers=2, size=64,
                       max_length=16, grid=2)  # fmt: skip
    with pytest.raises(UserError, match=r"model\.grid is 2.*set model\.grid=0"):
        if system:
            build_system(what, [MLM()], None, Learner)
        else:
            compose(what, [MLM()], None, Learner)


@pytest.mark.parametrize("system", ["uniter", "vl_bert", "vilt"])
def test_a_projection_that_starts_aligned_learns_at_its_own_rate(system, shapes, text_tower, image_tower, tmp_path):
    def learnt(name: str, steps: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        settings = toy_settings(shapes, text_tower, tmp_path / name, steps=steps, evaluate=False, aligned_lr=rate,
                                text_lr=0.0, image_lr=0.0)  # fmt: skip
        settings.objectives, settings.passes = {}, [{"mlm": {"mask": 0.4}, "itm": {"negatives": "swap"}}]
        settings.model.system, settings.model.image, settings.model.size = system, str(image_tower), 64
        model = Run.load(train(settings)).model
        parameters = dict(model.named_parameters())
        return parameters[projection_name(model) + "weight"], parameters["heads.mlm.norm.bias"]

    (start, before), (still, after), (moved, _) = learnt("one", 1, 0.0), learnt("five", 5, 0.0), learnt("fast", 5, 1e-2)
    assert torch.equal(start, still) and not torch.equal(before, after)
    assert (moved - start).abs().max() > 1e-3
