"""A start for what stands where: loud positions, attention that begins by likeness, towers cut short."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from interlace import align_words, towers
from interlace.alike import meeting
from interlace.compose import Composition, compose
from interlace.data.processor import Augment
from interlace.embed.stem import TextStem, TextTower
from interlace.errors import UserError
from interlace.layers import Width
from interlace.learner import Learner
from interlace.objectives import ITM, Binding
from interlace.objectives.binding import one_clause
from interlace.places import CELLS, WORDS
from interlace.settings import load_settings
from interlace.systems import configure_system


@pytest.fixture(scope="module")
def made(text_tower, image_tower):
    def make(**changes):
        sizes = {"width": 32, "heads": 4, "layers": 2, "size": 64, "max_length": 16} | changes
        what = Composition(text=str(text_tower), image=str(image_tower), dropout=0.0, places=True, **sizes)
        torch.manual_seed(0)
        return compose(what, [Binding()], None, Learner)

    return make


def loud(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def test_words_and_cells_say_where_they_are(made):
    model, _ = made()
    words, cells = model.text.positions[0], model.image.positions[0]
    assert words.shape[0] == 16
    assert loud(words) == pytest.approx(WORDS, rel=0.01) and loud(cells) == pytest.approx(CELLS, rel=0.3)
    side = round(len(cells) ** 0.5)
    grid = cells.view(side, side, -1)
    # a row and a column each: going right changes all rows of cells alike
    torch.testing.assert_close(grid[0, 1] - grid[0, 0], grid[-1, 1] - grid[-1, 0])
    assert not torch.allclose(grid[0, 1], grid[0, 0], atol=0.1)


@pytest.mark.parametrize("fusion", ["mid", "early"])
def test_what_is_alike_reads_each_other(made, fusion):
    """A word whose normed state is one cell's, up to a small difference, reads that cell more than any other."""
    model, _ = made(fusion=fusion, streams="dual")
    found = meeting(model.schedule)
    assert len(found) == 2 * sum(layer.crosses for layer in model.schedule.layers()) > 0
    for attend in found.values():
        attend.heads = 1  # all of the width in one head, as a word is compared with a cell
        cells = torch.nn.functional.layer_norm(torch.randn(1, 9, 32), (32,))
        with torch.no_grad():
            query = attend.query(cells[:, 4:5] + 0.1 * torch.randn(1, 1, 32))
            scores = (query @ attend.key(cells).transpose(1, 2))[0, 0]
        assert scores.argmax() == 4


@pytest.mark.parametrize("fusion", ["mid", "early"])
def test_in_one_sequence_a_word_reads_the_cell_that_is_like_it_and_not_itself(made, fusion):
    model, _ = made(fusion=fusion, streams="single", layers=4)
    words, cells = model.text.positions[0], model.image.positions[0]
    joint = [layer.attend for layer in model.schedule.layers() if layer.crosses]
    assert len(joint) == {"mid": 2, "early": 4}[fusion]
    states = torch.randn(6, 32)
    with torch.no_grad():
        x = model.schedule.layers()[0].attend.norm(torch.cat([states + words[:6], states + cells[:6]]))
        for n, attend in enumerate(joint):
            query, key = (part(x).view(12, 4, 8).transpose(0, 1) for part in (attend.query, attend.key))
            said = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1).mean(0)  # (12, 12), over the heads
            across = said[:6, 6:].sum(1).mean() + said[6:, :6].sum(1).mean()
            assert (across > 1.3) == (n % 2 == 0)  # of 2, where chance is 1: the layers between look where they like
            if n % 2 == 0:
                assert (said[:6, 6:].argmax(1) == torch.arange(6)).float().mean() > 0.6


def test_two_captions_of_one_picture_are_told_apart_by_their_words_alone(made):
    """Dropout in the head would drop other units for each, and say more than the words do."""
    model, _ = made()
    model.train()
    model.freeze("text", "image")  # as in the recipe; their own dropout rests then
    ids = torch.tensor([[2, 5, 6, 7, 3]] * 2)
    with torch.no_grad():
        text, image = model.half_text(ids), model.half_image(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
        out = model.fuse(text, image.rows(torch.zeros(2, dtype=torch.long)))
        one, other = model.heads["match"](out.pooled_text, out.pooled_image)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objectives", [[Binding(), ITM("drawn")], [ITM("drawn"), Binding()]])
def test_a_head_that_binding_shares_has_no_dropout_either(text_tower, image_tower, objectives):
    what = Composition(text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2, size=64,
                       max_length=16)  # fmt: skip
    model, _ = compose(what, objectives, None, Learner)
    assert model.heads["match"].dropout.p == 0


def test_without_places_a_model_has_no_more_parameters_than_before(text_tower, image_tower):
    plain, _ = compose(Composition(text=str(text_tower), image=str(image_tower), width=32, heads=4, layers=2, size=64,
                                   max_length=16), [Binding()])  # fmt: skip
    assert "text.positions" not in dict(plain.named_parameters())


def test_positions_survive_saving_and_a_longer_text_is_refused(made, tmp_path):
    model, _ = made()
    model.save_pretrained(tmp_path)
    again = Learner.from_pretrained(tmp_path)
    torch.testing.assert_close(again.text.positions, model.text.positions)
    ids = torch.ones(1, 17, dtype=torch.long)
    with pytest.raises(UserError, match=r"17 tokens.*16 positions"):
        model.half_text(ids, ids)


def test_word_order_changes_what_bare_word_vectors_say_only_with_positions(text_tower):
    """Without layers of the tower and without its own positions a text would be a bag of words."""
    tower = towers.load_tower(str(text_tower), "text", layers=0)
    torch.nn.init.zeros_(tower.model.embeddings.position_embeddings.weight)
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    for places in (0, 8):
        stem = TextStem(Width(32, heads=4), tower=tower.model.config.to_dict(), places=places).build().eval()
        assert isinstance(stem, TextTower)
        stem.tower.load_state_dict(tower.model.state_dict())
        if places:
            torch.nn.init.normal_(stem.positions)
        there, back = stem(ids)
        assert torch.allclose(there, back.flip(0), atol=1e-5) == (not places)


def test_the_first_layers_of_a_tower_say_what_they_said_in_it(text_tower):
    whole, ids = towers.load_tower(str(text_tower), "text").model, torch.tensor([[2, 5, 6, 7, 3]])
    states = whole(ids, output_hidden_states=True).hidden_states
    for layers in range(len(states)):
        cut = towers.load_tower(str(text_tower), "text", layers=layers).model
        assert cut.config.num_hidden_layers == layers
        torch.testing.assert_close(cut(ids).last_hidden_state, states[layers])
    with pytest.raises(UserError, match="text_layers is 99, but"):
        towers.load_tower(str(text_tower), "text", layers=99)


def test_a_published_system_has_its_own_positions(text_tower):
    what = Composition(system="uniter", text=str(text_tower), width=32, heads=4, layers=2)
    for changes in ({"places": True}, {"text_layers": 0}):
        with pytest.raises(UserError, match="has its own words and positions"):
            configure_system(dataclasses.replace(what, **changes), [Binding()])


def test_a_clause_is_true_of_one_caption_alone():
    rng = np.random.default_rng(0)
    true = "a chair at the top left, rice at the top right and a lamp at the bottom left"
    swapped = "rice at the top left, a chair at the top right and a lamp at the bottom left"
    seen = {one_clause(true, swapped, rng) for _ in range(50)}
    assert len(seen) == 4
    for ours, other in seen:
        assert ours in true and ours not in swapped and other in swapped and other not in true
        assert " and " not in ours and "lamp" not in ours  # what both say tells nothing
    assert one_clause("grass in a mug", "a mug in grass", rng) == ("grass in a mug", "a mug in grass")


def test_pictures_that_are_mirrored_or_cropped_do_not_show_what_stands_where():
    for augment in (Augment(), Augment(smallest_crop=1), Augment(flip=False)):
        with pytest.raises(UserError, match=r"augment\.flip=false"):
            Binding().check_augment(augment)
    Binding().check_augment(Augment(smallest_crop=1, flip=False))  # another colour stands where it stood
    Binding().check_augment(load_settings("binding").augment)


def test_a_crop_of_the_whole_area_is_the_picture():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
    for seed in range(5):
        seen = Augment(smallest_crop=1, flip=False, colour=0)(wide, np.random.default_rng(seed))
        assert seen.size == wide.size and seen.tobytes() == wide.tobytes()
        assert Augment(smallest_crop=0.99)(wide, np.random.default_rng(seed)).size != wide.size


def test_clauses_are_read_in_their_share_of_the_visits():
    from tests.objectives.test_binding import row

    objective, rng, short = Binding(clauses=0.25), np.random.default_rng(0), 0
    for _ in range(400):
        sample: dict = {"texts": {}, "part": {}}
        objective.prepare(sample, row(swapped="b at p and a at q"), 0, None, rng)
        short += sample["texts"]["clause"] != "a at p and b at q"
    assert 70 < short < 130
    with pytest.raises(UserError, match="share of the visits"):
        Binding(clauses=2)


# ------------------------------------------------------------------------------------------- words aligned with cells


class Kept:
    """What towers said of 300 pictures of two things out of eight, in two of nine cells, the rest blank; a caption
    names both among words that all captions have. Which cell is which name is not told."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.names, self.looks = rng.normal(size=(8, 12)), rng.normal(size=(8, 20))
        common, blank = rng.normal(size=(3, 12)), rng.normal(size=20)
        self.images = np.zeros((300, 1, 9, 20))
        self.captions, self.where, self.said = [], [], {}
        for n in range(300):
            a, b = rng.choice(8, 2, replace=False)
            i, j = rng.choice(9, 2, replace=False)
            cells = np.tile(blank, (9, 1))
            cells[i], cells[j] = self.looks[a], self.looks[b]
            self.images[n, 0] = cells + 0.1 * rng.normal(size=cells.shape)
            text = f"a {a} and {b}"
            self.captions.append(text)
            self.where.append(((a, i), (b, j)))
            self.said[text] = np.stack([common[0], self.names[a], common[1], self.names[b]]).astype(np.float32)

    def text(self, text):
        return self.said[text]


class Numbers:
    """Tokenises "a 3 and 5"."""

    def texts(self, texts):
        ids = torch.tensor([[100, int(a), 101, int(b)] for _, a, _, b in (t.split() for t in texts)])
        return ids, torch.ones_like(ids)


def right_cells(kept: Kept, found) -> float:
    """Share of the names whose product with their own cell is larger than with any other of the picture."""
    right = []
    for n, things in enumerate(kept.where):
        cells = (kept.images[n, 0] - found.mean_cell) @ found.to_cell
        for name, cell in things:
            word = (kept.names[name] - found.mean_word) @ found.to_word
            right.append(np.argmax(cells @ word) == cell)
    return float(np.mean(right))


def test_words_find_their_cells_without_being_told_which(monkeypatch):
    kept = Kept()
    groups = [str(n) for n in range(300)]
    args = kept, list(range(300)), kept.captions, groups, Numbers(), 8
    found = align_words.align_words(*args)
    assert right_cells(kept, found) > 0.95
    words = np.stack([kept.names[a] for things in kept.where for a, _ in things])
    cells = np.stack([kept.images[n, 0, c] for n, things in enumerate(kept.where) for _, c in things])
    for side in ((words - found.mean_word) @ found.to_word, (cells - found.mean_cell) @ found.to_cell):
        assert side.std() == pytest.approx(1, rel=0.25)  # as loud as the positions count on
        assert np.abs(side.mean(0)).max() < 0.35  # measured from the middle of things, not of the blank
    monkeypatch.setattr(align_words, "ROUNDS", 0)
    coarse = align_words.align_words(*args)
    blank = (kept.images[:, 0].reshape(-1, 20) - coarse.mean_cell) @ coarse.to_cell
    assert np.abs(blank.mean(0)).max() < 1e-6  # a map between wholes is measured from the page


def test_words_that_all_captions_have_weigh_nothing():
    rare = align_words.rarity(["a 1 and 2", "a 1 and 3", "a 4 and 3", "a 5 and 6"], Numbers())
    np.testing.assert_allclose(rare["a 1 and 3"], [0, np.log(2), 0, np.log(2)])
    np.testing.assert_allclose(rare["a 5 and 6"], [0, np.log(4), 0, np.log(4)])
