"""MLIM's objectives in passes of real batches, and the probes of what they learned."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from interlace.config import VLConfig
from interlace.data.batches import Collate, Samples
from interlace.data.processor import Augment, Processor
from interlace.data.sources import open_source
from interlace.embed.conv import Blocks
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import ITM, MLM, Pass, build_objective
from interlace.objectives.base import Views
from interlace.objectives.modality_masking import MAM, ModalityDropout
from interlace.objectives.reconstruct import Recon, pixel_losses
from interlace.presets import mlim
from interlace.run import Run, save_run
from interlace.tasks.probes import difference, mlm_loss, probe, recon_loss

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "yellow": (230, 200, 40),
           "black": (20, 20, 20), "pink": (240, 130, 200)}  # fmt: skip
VARIANTS = 12


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Pictures of one colour, more or less bright, whose caption names it; a seventh of them are the test split."""
    folder = tmp_path_factory.mktemp("colours")
    rng, rows = np.random.default_rng(0), []
    for word, colour in COLOURS.items():
        for n in range(VARIANTS):
            shade = np.clip(np.array(colour) + rng.integers(-15, 16), 0, 255).astype(np.uint8)
            Image.new("RGB", (32, 32), tuple(shade.tolist())).save(folder / f"{word}{n}.png")
            rows.append({"id": f"{word}{n}", "image": f"{word}{n}.png", "caption": f"{word} square",
                         "group": word, "split": "test" if n % 6 == 0 else "train"})  # fmt: skip
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return open_source(folder)


@pytest.fixture(scope="module")
def processor(text_tower):
    from transformers import AutoTokenizer

    return Processor(AutoTokenizer.from_pretrained(text_tower), 32, [0.0] * 3, [1.0] * 3, max_length=12,
                     augment=Augment(1.0, False, 0.0))  # fmt: skip


def learner(processor, passes, **changes):
    torch.manual_seed(0)
    width = Width(32, heads=4, dropout=0.0, attention_dropout=0.0)
    words = Words(width, pool="tanh", vocabulary=len(processor.tokenizer), positions=16)
    image = Blocks(width, size=32, channels=[8, 16], strides=[2, 2, 2], kernels=[2, 2, 2], mask=processor.mask_id)
    heads = {"mlm": {"kind": "tied", "labels": words.vocabulary}, "pixels": mlim.decoder(image, 5),
             "match": {"kind": "linear", "labels": 2}}  # fmt: skip
    config = mlim.mlim(**{"text": words, "image": image, "layers": 2, "heads": heads, **changes})
    return Learner(config).learn_by(passes)


def batch(source, processor, model, rows, epoch=0, split="train"):
    samples = Samples(source, split, processor, model.passes, seed=0, augment=False)
    collate = Collate(processor, passes=model.passes, cells=model.cells_to_hide())
    return collate([samples[epoch, row] for row in rows])


def pass_views(model, b, n=0):
    return Views(model, b, b["parts"][n], model.passes[n])


# ----------------------------------------------------------------------------------------------------------- objectives


def test_words_and_cells_are_hidden_by_mode_and_only_words_of_the_caption(colours, processor):
    model = learner(processor, [Pass([(MAM(), 1.0), (Recon(), 1.0)])])
    b = batch(colours, processor, model, range(60))
    part = b["parts"][0]
    labels, hidden = part["word_labels"], part["hidden"]
    assert hidden.shape == (60, 16) and hidden.dtype == torch.bool
    asked = labels >= 0
    assert not asked[:, 0].any() and not (asked & (b["caption_ids"] == processor.tokenizer.sep_token_id)).any()
    assert (part["text_ids"][asked] == processor.mask_id).all()
    assert torch.equal(part["text_ids"][~asked], b["caption_ids"][~asked])
    assert torch.equal(labels[asked], b["caption_ids"][asked])
    of_text, of_image = asked.any(1), hidden.any(1)
    assert (of_text | of_image).all() and (of_text & ~of_image).any() and (of_image & ~of_text).any()
    assert (of_text & of_image).any()  # light
    assert abs(hidden[of_image & ~of_text].float().mean() - 0.8) < 0.06
    again = batch(colours, processor, model, range(60))["parts"][0]
    other = batch(colours, processor, model, range(60), epoch=1)["parts"][0]
    assert torch.equal(again["hidden"], hidden) and not torch.equal(other["hidden"], hidden)


def test_a_heavy_image_may_be_hidden_whole(colours, processor):
    model = learner(processor, [Pass([(MAM(heavy_image=1.0), 1.0), (Recon(), 1.0)])])
    part = batch(colours, processor, model, range(60))["parts"][0]
    asked, hidden = (part["word_labels"] >= 0).any(1), part["hidden"]
    heavy = hidden.any(1) & ~asked
    assert heavy.any() and hidden[heavy].all() and not hidden[~heavy].all(1).any()


def test_the_loss_is_the_sum_of_both_and_each_is_logged(colours, processor):
    model = learner(processor, [Pass([(MAM(), 1.0), (Recon(), 0.5)])])
    b = batch(colours, processor, model, range(12))
    out = model(**b)
    assert set(out["losses"]) == {"mlm", "mlm_accuracy", "recon", "recon_r2"}
    torch.testing.assert_close(out["loss"], out["losses"]["mlm"] + 0.5 * out["losses"]["recon"])
    mean = learner(processor, [Pass([(MAM(), 1.0), (Recon("mean"), 1.0)])])
    torch.testing.assert_close(3 * mean(**b)["losses"]["recon"], out["losses"]["recon"])
    # the whole picture is scored, hidden and visible
    drawn = model.heads["pixels"](pass_views(model, b).fused().image)
    torch.testing.assert_close(out["losses"]["recon"], pixel_losses(drawn, b["pixel_values"] / 255).mean())


def test_a_batch_that_hides_no_word_has_a_zero_with_a_gradient(colours, processor):
    model = learner(processor, [Pass([(MAM(), 1.0)])])
    b = batch(colours, processor, model, range(4))
    b["parts"][0]["word_labels"].fill_(-100)
    loss = model(**b)["loss"]
    loss.backward()
    assert loss == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.heads["mlm"].bias.grad is not None  # used, so that ranks agree on who has a gradient


def test_the_gradient_reaches_every_parameter(colours, processor):
    model = learner(processor, [Pass([(MAM(), 1.0), (Recon(), 1.0), (ITM("swap"), 1.0)])])
    model(**batch(colours, processor, model, range(30)))["loss"].backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if not n.endswith("key.bias")] == []


def test_a_swapped_sentence_is_scored_or_not(colours, processor):
    def recon(mismatched):
        objectives = [(MAM(mismatched=mismatched), 1.0), (Recon(mismatched=mismatched), 1.0), (ITM("swap"), 1.0)]
        model = learner(processor, [Pass(objectives)])
        b = batch(colours, processor, model, range(40))
        matched = b["parts"][0]["matched"]
        assert matched.any() and not matched.all()
        scored = (b["parts"][0]["word_labels"] >= 0).any(1)
        assert (scored & ~matched).any() == mismatched and (scored & matched).any()
        return model(**b)["losses"]["recon"]

    assert recon(False) < recon(True)


def test_dropout_hides_a_modality_for_the_pass_and_is_no_loss(colours, processor):
    model = learner(processor, [Pass([(ITM("swap"), 1.0), (ModalityDropout(image=0.5, text=0.5), 1.0)])])
    b = batch(colours, processor, model, range(30))
    part = b["parts"][0]
    no_image, no_text = part["hidden"].all(1), (part["text_ids"] == processor.mask_id).sum(1) == 2
    assert (no_image ^ no_text).all() and no_image.any() and no_text.any()
    assert not part["hidden"][no_text].any()
    out = model(**b)
    torch.testing.assert_close(out["loss"], out["losses"]["itm"])


def heads_for(image):
    return Recon().head_for(Words(image.width), image)


def test_any_square_grid_of_cells_can_be_drawn_from():
    patches = Patches(Width(64, heads=4), size=64, patch=16)
    assert heads_for(patches) == {"kind": "pixels", "grid": 4, "up": [32, 16, 8, 4], "smooth": [8] * 5}
    with pytest.raises(UserError, match=r"model\.size"):
        heads_for(Patches(Width(64, heads=4), size=60, patch=12))


def test_patches_that_hide_learn_by_the_same_two(colours, processor):
    torch.manual_seed(0)
    width = Width(32, heads=4, norm="pre")
    words = Words(width, vocabulary=len(processor.tokenizer), positions=16)
    image = Patches(width, size=32, patch=8, hide=True)
    passes = [Pass([(MAM(), 1.0), (Recon(), 1.0)])]
    heads = {o.head: o.head_for(words, image) for o, _ in passes[0].objectives}
    model = Learner(VLConfig(words, image, fusion="early", streams="single", layers=2, heads=heads)).learn_by(passes)
    out = model(**batch(colours, processor, model, range(12)))
    out["loss"].backward()
    assert model.image.hidden.grad.abs().sum() > 0 and torch.isfinite(out["loss"])


@pytest.mark.parametrize("wrong, said", [
    (lambda p: MAM(heavy=1.0), "mam.heavy"),
    (lambda p: MAM(heavy_image=1.2), "mam.heavy_image"),
    (lambda p: MAM(scope="row"), "sample or batch"),
    (lambda p: ModalityDropout(0.7, 0.5), "mdo.image"),
    (lambda p: Recon("max"), "sum or mean"),
    (lambda p: build_objective("mam", {"haevy": 0.5}), "Did you mean 'heavy'"),
    (lambda p: learner(p, [Pass([(MAM(), 1.0)])], heads={}), "needs the 'mlm' head"),
    (lambda p: learner(p, [Pass([(Recon(), 1.0)])], heads={"pixels": {"grid": 4, "up": [8], "smooth": []}}), "8x8"),
])  # fmt: skip
def test_what_is_refused(wrong, said, processor):
    with pytest.raises(UserError, match=said):
        wrong(processor)


def test_two_that_hide_cannot_share_a_pass_and_dropout_needs_another(colours, processor):
    model = learner(processor, [Pass([(MLM(), 1.0), (MAM(), 1.0)])])
    with pytest.raises(UserError, match="leave other objectives"):
        batch(colours, processor, model, range(2))
    model = learner(processor, [Pass([(ModalityDropout(), 1.0)])])
    with pytest.raises(UserError, match="give it one"):
        model(**batch(colours, processor, model, range(2)))


def test_frozen_states_are_no_pictures(colours, processor):
    model = learner(processor, [Pass([(MAM(), 1.0), (Recon(), 1.0)])])
    b = batch(colours, processor, model, range(2))
    del b["pixel_values"]
    with pytest.raises(UserError, match="pictures themselves"):
        Recon().loss(model, b, pass_views(model, b))


# --------------------------------------------------------------------------------------------------------------- probes


@pytest.fixture(scope="module")
def learned(colours, processor, tmp_path_factory):
    """A run that learned the colours' names for a few steps; nearly all is hidden, so that each must tell the other."""
    model = learner(processor, [Pass([(MAM(heavy=0.98), 1.0), (Recon(), 1.0)])]).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    order = np.random.default_rng(0)
    for epoch in range(100):
        b = batch(colours, processor, model, order.choice(60, 20, replace=False), epoch)
        optimiser.zero_grad()
        model(**b)["loss"].backward()
        optimiser.step()
    return Run.load(save_run(tmp_path_factory.mktemp("runs") / "mlim", model, processor))


def test_the_true_picture_helps_to_guess_words(learned, colours):
    found = {image: mlm_loss(learned, colours, image=image) for image in ("paired", "random", "blank")}
    assert found["paired"].interval.values == 12 and found["paired"].interval.groups == 6
    assert found["paired"].interval.low <= found["paired"].mean <= found["paired"].interval.high
    for other in ("random", "blank"):
        assert found["paired"].mean < found[other].mean - 0.2, found
        assert difference(found[other], found["paired"]).low > 0


def test_the_true_text_helps_to_draw_the_picture(learned, colours):
    # with every cell hidden, so that the words alone say the colour
    found = {text: recon_loss(learned, colours, text=text, rate=1.0) for text in ("paired", "random", "empty")}
    for other in ("random", "empty"):
        assert found["paired"].mean < found[other].mean, found
    assert difference(found["random"], found["paired"]).low > 0
    mean = recon_loss(learned, colours, rate=1.0, channels="mean")
    np.testing.assert_allclose(3 * mean.values, found["paired"].values, rtol=1e-6)


def test_an_untrained_model_has_nothing_of_its_pairs(processor, colours, tmp_path):
    run = Run.load(save_run(tmp_path / "run", learner(processor, []), processor))
    # of log(vocabulary), whatever the picture
    values = [mlm_loss(run, colours, image=image).mean for image in ("paired", "random", "blank")]
    assert np.ptp(values) < 0.1 and abs(values[0] - np.log(len(processor.tokenizer))) < 0.3


def test_conditions_hide_the_same_and_seeds_differ(learned, colours):
    a, b = mlm_loss(learned, colours), mlm_loss(learned, colours)
    assert np.array_equal(a.values, b.values) and np.array_equal(a.rows, b.rows)
    assert not np.array_equal(recon_loss(learned, colours, seed=1).values, recon_loss(learned, colours).values)
    with pytest.raises(ValueError, match="different rows"):
        difference(a, mlm_loss(learned, colours, split="train"))


def test_both_probes_as_plain_numbers(learned, colours):
    found = probe(learned, colours, limit=8)
    assert set(found) == {"mlm_loss", "mlm_accuracy", "recon_loss"}
    assert set(found["recon_loss"]) == {"paired", "random", "empty"}
    right = found["mlm_accuracy"]
    assert all(0 <= right[c]["value"] <= 1 for c in right) and right["paired"]["rows"] == 8
    other, own = found["mlm_loss"]["random"], found["mlm_loss"]["paired"]
    assert other["difference"] == pytest.approx(other["value"] - own["value"]) and 0 < other["p"] <= 1
    assert own["rows"] == 8 and "difference" not in own


def test_what_a_probe_refuses(learned, colours, processor, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'blank'"):
        mlm_loss(learned, colours, image="blanc")
    with pytest.raises(UserError, match="no row with a caption"):
        recon_loss(learned, colours, split="val")
    headless = Run.load(save_run(tmp_path / "run", learner(processor, [], heads={}), processor))
    with pytest.raises(UserError, match="no mlm head"):
        mlm_loss(headless, colours)
    with pytest.raises(UserError, match="no pixels head"):
        recon_loss(headless, colours)
    assert probe(headless, colours) == {}
