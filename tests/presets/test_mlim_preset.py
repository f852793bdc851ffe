"""MLIM: sizes of the paper, the weights it starts from, and what must hold whatever the weights."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining

from interlace.cli import main
from interlace.compose import Composition
from interlace.embed.conv import Blocks
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.model import VLModel
from interlace.objectives import MAM, Recon
from interlace.objectives.mlm import masked_words
from interlace.objectives.reconstruct import pixel_losses
from interlace.presets import mlim
from interlace.run import Run
from interlace.systems import build_system

MASK = 4


def count(module):
    return sum(p.numel() for p in module.parameters())


def meta(config):
    with torch.device("meta"):
        return VLModel(config)


def batch(rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, 99, (rows, 7), generator=g), torch.rand(rows, 3, 32, 32, generator=g)


def fuse(model, ids, pixels, mask=None, hidden=None):
    return model.fuse(model.half_text(ids, mask), model.half_image(pixels, hidden=hidden))


def some_hidden(rows=3):
    hidden = torch.zeros(rows, 16, dtype=torch.bool)
    hidden[:, [1, 6, 11]] = True
    return hidden


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLModel(mlim.tiny()).eval()


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("make, cnn, drawn, cells", [
    (mlim.mlim, 202_368, 2_806_483, 144),
    (mlim.mlim_grid3, 198_788, 2_797_048 + 584 + 584 + 219, 9),  # the deconvolutions alone, then three of 3x3
])  # fmt: skip
def test_cnn_and_decoder_have_the_paper_s_sizes(make, cnn, drawn, cells):
    model = meta(make())
    assert count(model.image.convs) == cnn and len(model.image.convs) == 7
    assert count(model.heads["pixels"]) == drawn and len(model.heads["pixels"].layers) == 10
    assert model.config.image.cells == cells and model.heads["pixels"].size == 384


def test_the_whole():
    model, trunk = meta(mlim.mlim()), meta(mlim.mlim(heads={}))
    bert = 335_141_888  # transformers' BertModel of bert-large-uncased
    assert count(trunk) == bert + 202_368 + 144 * 1024
    assert count(model) == count(trunk) + (1024**2 + 1024 + 2 * 1024 + 30522) + 2_806_483


def test_base_reads_7x7_cells_of_224_pixels():
    config = mlim.mlim_base()
    assert (config.image.cells, config.image.patch, len(config.segments["joint"])) == (49, 32, 12)
    assert config.heads["pixels"]["up"] == [384, 192, 96, 48, 24] and meta(config).heads["pixels"].size == 224


# -------------------------------------------------------------------------------------------------- what it starts from


@pytest.mark.parametrize("names", ["pretraining", "with buffers and the tied table"])
def test_it_starts_as_bert(names):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 128, "max_position_embeddings": 24}  # fmt: skip
    theirs = BertForPreTraining(BertConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    tensors = dict(theirs.state_dict())
    if names != "pretraining":
        tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    model = VLModel(mlim.tiny()).eval()
    before = model.image.positions.weight.clone()
    report = mlim.load_bert(model, tensors)
    assert all(name.startswith(("image.", "heads.pixels.")) for name in report.fresh)
    assert {n for n in report.dropped if "position_ids" not in n} == {"cls.seq_relationship.weight",
                                                                      "cls.seq_relationship.bias"}  # fmt: skip
    assert torch.equal(model.image.positions.weight, before)
    ids, mask = batch()[0], torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
        out = model.fuse(model.half_text(ids, mask), None)
        logits = model.heads["mlm"](out.text, model.text.words.weight)
    real = mask.bool()
    torch.testing.assert_close(out.text[real], expected.hidden_states[-1][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[real], expected.prediction_logits[real], atol=1e-4, rtol=1e-5)
    pooled = theirs.bert(ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(out.pooled_text, pooled, atol=1e-5, rtol=1e-5)


def test_a_folder_of_bert_is_converted(text_tower, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12,
             "intermediate_size": 96, "max_position_embeddings": 24}  # fmt: skip
    theirs = BertForPreTraining(BertConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "bert")
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "ours"), "--preset", "mlim_base"]) == 0
    assert "at their initial values: image.convs.0.weight" in capsys.readouterr().out.replace("\n", " ")
    model = VLModel.from_pretrained(tmp_path / "ours").eval()
    assert set(model.heads) == {"mlm", "pixels"} and model.heads["pixels"].size == 224
    ids = batch()[0]
    with torch.no_grad():
        expected = theirs(ids).prediction_logits
        got = model.heads["mlm"](model.fuse(model.half_text(ids), None).text, model.text.words.weight)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    given = ["--preset", "mlim_base", "--tokenizer", str(text_tower)]  # with words it is a run
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "run"), *given]) == 0
    processor = Run.load(tmp_path / "run").processor
    assert (processor.size, processor.mean, processor.std) == (224, [0.0] * 3, [1.0] * 3)  # its CNN takes 0 to 1


# ------------------------------------------------------------------------------------------------------------- the CNN


@torch.no_grad()
def test_a_cell_sees_its_own_block_alone(model):
    _, pixels = batch()
    changed = pixels.clone()
    changed[:, :, 8:16, 16:24] = torch.rand(3, 3, 8, 8)  # row 1, column 2 of 4x4
    differ = (model.image.contents(pixels) - model.image.contents(changed)).abs().amax(-1) > 0
    assert differ.nonzero()[:, 1].unique().tolist() == [6]


@torch.no_grad()
def test_pixels_of_a_hidden_block_are_invisible(model):
    ids, pixels = batch()
    noise = torch.rand(3, 3, 32, 32)
    inside = some_hidden().view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(inside, noise, pixels)
    a, b = fuse(model, ids, pixels, hidden=some_hidden()), fuse(model, ids, changed, hidden=some_hidden())
    assert torch.equal(a.text, b.text) and torch.equal(a.image, b.image)
    assert torch.equal(model.heads["pixels"](a.image), model.heads["pixels"](b.image))
    assert (fuse(model, ids, pixels).text - fuse(model, ids, changed).text).abs().max() > 1e-4


@torch.no_grad()
def test_hidden_words_and_cells_look_alike_but_for_their_position(model):
    words, image = model.text, model.image
    everything = torch.ones(1, 16, dtype=torch.bool)
    cells = image(torch.rand(1, 3, 32, 32), words, everything)
    row = words.words.weight[MASK] + words.types.weight[0]
    torch.testing.assert_close(cells[0], words.norm(row + image.positions.weight))
    ids = torch.full((1, 5), MASK)
    torch.testing.assert_close(words(ids)[0], words.norm(row + words.positions.weight[:5]))


def test_the_gradient_of_hidden_cells_reaches_the_word_mask_and_not_the_cnn():
    model = VLModel(mlim.tiny()).eval()
    everything = torch.ones(3, 16, dtype=torch.bool)
    out = fuse(model, *batch(), hidden=everything)
    out.image.square().sum().backward()
    assert model.text.words.weight.grad[MASK].abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.image.convs.parameters())


@torch.no_grad()
def test_a_picture_comes_through_at_a_word_s_scale():
    torch.manual_seed(0)
    width = Width(256, heads=4)
    embed = Blocks(width).build()
    deviation = embed.contents(torch.rand(2, 3, 384, 384)).std()
    assert 0.01 < deviation < 0.5, deviation


@pytest.mark.parametrize("options, said", [
    ({"kernels": [3, 2, 2, 2, 2, 1, 1]}, "as large as its stride"),
    ({"channels": [16]}, "one channel fewer"),
    ({"size": 100}, "does not divide"),
])  # fmt: skip
def test_an_embedder_that_would_leak_or_cannot_be_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        Blocks(Width(32, heads=4), **options).build()


def test_what_else_is_refused(model):
    with pytest.raises(UserError, match="32x32"):
        model.half_image(torch.rand(1, 3, 48, 48))
    with pytest.raises(UserError, match=r"heads\.pixels\.grid"):
        model.heads["pixels"](torch.rand(1, 9, 32))
    with pytest.raises(UserError, match="power of two"):
        mlim.decoder(Blocks(Width(32, heads=4), size=96, strides=[3, 2], kernels=[3, 2], channels=[8]))


# ----------------------------------------------------------------------------------------------------------- properties


@torch.no_grad()
def test_bytes_and_numbers_between_0_and_1_are_the_same_picture(model):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    a, b = model.half_image(pixels).states, model.half_image(pixels / 255).states
    torch.testing.assert_close(a, b)


def test_the_decoder_s_first_picture_is_grey_and_its_losses_those_of_knowing_nothing(model):
    ids, pixels = batch()
    with torch.no_grad():
        out = fuse(model, ids, pixels)
        drawn = model.heads["pixels"](out.image)
        words = masked_words(model.heads["mlm"](out.text, model.text.words.weight), ids)
    assert (drawn - 0.5).abs().max() < 0.35
    assert abs(pixel_losses(drawn, pixels).mean() - 3 / 12) < 0.05  # the variance of uniform noise, three times
    assert abs(words - torch.tensor(99.0).log()) < 0.2


def test_eight_pairs_are_learned_by_heart():
    """Hidden words are read off the picture, and a picture that is all hidden is drawn from its words."""
    torch.manual_seed(0)
    config = mlim.tiny()
    for spec in (config.text, config.image):
        spec.width = replace(spec.width, dropout=0.0, attention_dropout=0.0)
    model = VLModel(config).train()
    colours = torch.cartesian_prod(*[torch.tensor([0.2, 0.8])] * 3)  # (8, 3)
    pixels = colours[..., None, None].expand(-1, -1, 32, 32).contiguous()
    ids = torch.cat([torch.full((8, 1), 2), torch.arange(10, 18)[:, None], torch.full((8, 1), 3)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    seen = torch.zeros(16, 16, dtype=torch.bool)
    seen[8:] = True  # eight rows in which the word is hidden, eight in which the picture is
    both = torch.cat([ids.masked_fill(labels >= 0, MASK), ids]), torch.cat([pixels, pixels])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(90):
        out = fuse(model, *both, hidden=seen)
        words = masked_words(model.heads["mlm"](out.text[:8], model.text.words.weight), labels)
        recon = pixel_losses(model.heads["pixels"](out.image), both[1])
        optimiser.zero_grad()
        (words + recon.mean()).backward()
        optimiser.step()
    assert words < 0.1 and recon[8:].mean() < 0.1, (words, recon)  # grey everywhere would be 0.27
    # and it is the words that say the colour
    with torch.no_grad():
        swapped = model.heads["pixels"](fuse(model, ids.roll(1, 0), pixels, hidden=seen[8:]).image)
    assert 3 * F.mse_loss(swapped, pixels.roll(1, 0)) < F.mse_loss(swapped, pixels)


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def items():
    torch.manual_seed(0)
    return VLModel(mlim.tiny(heads={"same": mlim.ITEMS})).eval()


def test_pairs_of_items(items):
    first, second = fuse(items, *batch()), fuse(items, *batch(seed=1))
    logits = mlim.compare(items, first, second)
    assert logits.shape == (3,)
    F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0, 1])).backward()
    silent = [n for n, p in items.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


@torch.no_grad()
def test_the_order_of_two_items_counts_only_through_their_own_vectors(items):
    head, p, q = items.heads["same"], torch.randn(3, 32), torch.randn(3, 32)
    there, back = head(p, q), head(q, p)
    assert (there - back).abs().max() > 1e-4
    a, b, rest = head.hidden.weight[:, :32].clone(), head.hidden.weight[:, 32:64].clone(), head.hidden.weight[:, 64:]
    head.hidden.weight.copy_(torch.cat([b, a, rest], 1))
    torch.testing.assert_close(head(q, p), there)
    head.hidden.weight[:, :64] = 0  # what remains are |p - q| and p * q
    torch.testing.assert_close(head(p, q), head(q, p))
    head.hidden.weight[:, 96:] = 0  # and of equal items |p - q| is 0, whoever they are
    torch.testing.assert_close(head(p, p), head(q, q))


# ------------------------------------------------------------------------------------------- cells of an image tower


def test_small_reads_a_towers_cells_and_draws_the_picture_from_them(text_tower, image_tower):
    what = Composition(system="mlim", text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2,
                       size=64, grid=2, max_length=16)  # fmt: skip
    model, processor = build_system(what, [MAM(), Recon()], None, Learner)
    model.eval()
    spec, head = model.config.image, model.heads["pixels"]
    assert (spec.cells, spec.hide, head.grid, head.size) == (4, True, 2, 64)
    ids, mask = processor.texts(["a red circle"])
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        kept = model.image.states(model.normalise(pixels))
        hidden = torch.tensor([[True, False, False, False]])
        other = kept.clone()
        other[:, 0] += 1  # what the hidden cell would have said
        text = model.half_text(ids, mask)
        first, second = (model.fuse(text, model.half_from("image", states, hidden=hidden)).image
                         for states in (kept, other))  # fmt: skip
        assert torch.equal(first, second)
        assert not torch.equal(first, model.fuse(text, model.half_from("image", kept)).image)
        assert head(first).shape == (1, 3, 64, 64)


def test_cells_that_do_not_double_to_the_picture_are_refused(text_tower, image_tower):
    what = Composition(system="mlim", text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2,
                       size=96, grid=2, max_length=16)  # fmt: skip
    with pytest.raises(UserError, match=r"power of two; got 48: 2 x 2 cells of a picture of 96"):
        build_system(what, [MAM(), Recon()], None, Learner)
