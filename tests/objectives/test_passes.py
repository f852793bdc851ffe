"""Passes of real batches, for every system that trains from pictures: what is hidden, what is shared, what adds up."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from interlace.compose import Composition
from interlace.data.batches import Collate, EpochSampler, Samples
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.learner import Learner
from interlace.objectives import ITC, ITM, MLM, MRFR, Pass
from interlace.objectives.base import Objective
from interlace.settings import find_recipe, load_settings
from interlace.systems import build_from_run, build_system
from interlace.train import build_passes, train

SYSTEMS = ["uniter", "visual_bert", "vl_bert", "lxmert", "vilbert", "vilt", "blip", "mlim", "vision_encoder_decoder"]


@pytest.fixture(scope="module")
def source(shapes):
    return open_source(shapes)


@pytest.fixture(scope="module")
def system(source, text_tower, image_tower):
    """name -> the small system over toy towers with the passes of its small recipe, without any dropout."""
    built = {}

    def build(name: str, seed: int = 0):
        recipe = yaml.safe_load(find_recipe(f"{name}-small").read_text())
        settings = load_settings(find_recipe(f"{name}-small"))
        passes = build_passes(settings, source)
        what = Composition(system=recipe["model"]["system"], text=str(text_tower), width=32, heads=4, layers=3,
                           image="patches" if recipe["model"]["image"] == "patches" else str(image_tower),
                           size=64, patch=16, dropout=0.0, max_length=16)  # fmt: skip
        torch.manual_seed(seed)
        model, processor = build_system(what, [o for one in passes for o, _ in one.objectives], None, Learner)
        model.learn_by(passes)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.freeze(*(["image"] if hasattr(model.image, "tower") else []))
        return model, processor

    def cached(name: str):
        if name not in built:
            built[name] = build(name)
        return built[name]

    return cached


def batch(source, model, processor, rows, epoch=0, drawn=()):
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    collate = Collate(processor, passes=model.passes, cells=model.cells_to_hide())
    return collate([samples[(epoch, row, *drawn)] for row in rows])


def with_totals(model, batches):
    """What the trainer adds: the mean over micro-batches of what each objective counts."""
    for number, one in enumerate(model.passes):
        counts = [one.totals(b["parts"][number], b) for b in batches]
        means = {key: torch.stack([c[key] for c in counts]).mean() for key in counts[0]}
        for b in batches:
            b["parts"][number]["totals"] = means
    return batches


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, system, source):
    model, processor = copy.deepcopy(system(name))  # the passes of the shared one stay as they are
    if any(isinstance(o, ITC) or getattr(o, "negatives", "") in ("hard", "both") for o, _ in model.objectives):
        plain = [[(o, w) for o, w in one.objectives if not isinstance(o, ITC | ITM)] for one in model.passes]
        model.passes = [Pass(objectives) for objectives in plain]
    model.train()
    whole = model(**batch(source, model, processor, range(8)))["loss"]
    whole.backward()
    expected = gradients(model)
    assert math.isfinite(whole.item()) and expected
    total = 0.0
    for piece in with_totals(model, [batch(source, model, processor, [n, n + 1]) for n in range(0, 8, 2)]):
        loss = model(**piece)["loss"] / 4  # the trainer's division
        loss.backward()
        total += loss.item()
    got = gradients(model)
    distances = {"wra", "wpa"} & {o.name for o, _ in model.objectives}
    assert total == pytest.approx(whole.item(), rel=1e-4 if not distances else 1e-3)
    assert got.keys() == expected.keys()
    for part in expected:
        scale = expected[part].abs().max().item()
        torch.testing.assert_close(got[part], expected[part], atol=2e-5 + 2e-3 * scale, rtol=2e-3, msg=part)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_losses_go_down_and_all_that_should_learn_does(name, system, source):
    model, processor = system(name)
    model.train()
    b = batch(source, model, processor, range(8))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first, touched = None, set()
    for _ in range(25):
        loss = model(**b)["loss"]
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        touched |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimiser.step()
    assert loss.item() < 0.8 * first
    idle = {".".join(n.split(".")[:2]) for n, p in model.named_parameters() if p.requires_grad and n not in touched}
    # what no objective of the recipe reads: a pooler without matching, types that only two sentences have, the vector
    # of text alone where every pass has pictures
    assert idle <= {"poolers.text", "poolers.image", "text.types", "schedule.meet", "image.types", "schedule.close",
                    "schedule.cross", "image.regions"}, idle  # fmt: skip


def test_a_row_hides_the_same_words_whoever_stands_beside_it(system, source):
    model, processor = system("visual_bert")
    alone, together = (batch(source, model, processor, rows)["parts"][0] for rows in ([5], [0, 5, 9, 11]))
    words = alone["text_mask"][0].sum()
    assert alone["text_ids"][0, :words].tolist() == together["text_ids"][1, :words].tolist()
    assert alone["word_labels"][0, :words].tolist() == together["word_labels"][1, :words].tolist()
    other = batch(source, model, processor, [5], epoch=1)["parts"][0]
    assert any(alone[key].shape != other[key].shape or not alone[key].equal(other[key]) for key in alone)


class Words:
    mask_id, plain_ids = 4, np.arange(10, 1000)


def hidden(objective: MLM, rows=400, length=20):
    ids = torch.arange(10, 10 + length).repeat(rows, 1)
    words = torch.arange(length).repeat(rows, 1) // 2  # two pieces a word
    words[:, 0] = words[:, -1] = -1  # specials
    part = {"text_ids": ids, "text_words": words}
    objective.corrupt(part, [np.random.default_rng(n) for n in range(rows)], Words())
    return ids, part


def test_a_share_of_the_words_is_hidden_mostly_masked_and_never_a_special_token():
    ids, part = hidden(MLM(mask=0.3))
    labels, asked = part["word_labels"], part["word_labels"] >= 0
    assert not asked[:, 0].any() and not asked[:, -1].any()
    assert labels[asked].equal(ids[asked]) and part["text_ids"][~asked].equal(ids[~asked])
    assert asked[:, 1:-1].float().mean().item() == pytest.approx(0.3, abs=0.02)
    shown = part["text_ids"][asked]
    assert (shown == 4).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown == labels[asked]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_whole_words_are_hidden_piece_and_all():
    _, part = hidden(MLM(mask=0.3, whole_words=True))
    asked = part["word_labels"] >= 0
    assert asked[:, 2:18:2].equal(asked[:, 3:19:2]) and asked.any()


def test_at_least_one_word_is_hidden_unless_told_otherwise():
    assert (hidden(MLM(mask=0.01))[1]["word_labels"] >= 0).any(1).all()
    assert not (hidden(MLM(mask=0.01, at_least_one=False))[1]["word_labels"] >= 0).any(1).all()


def test_words_are_said_at_hidden_positions_alone(system, source):
    """A head over a vocabulary is the dearest part of a step: it never sees a position that is not asked about."""
    model, processor = system("visual_bert")
    b, said = batch(source, model, processor, range(6), drawn=(0,)), []
    asked = int((b["parts"][0]["word_labels"] >= 0).sum())
    handle = model.heads["mlm"].register_forward_hook(lambda head, given, out: said.append(tuple(out.shape)))
    model(**b)
    handle.remove()
    assert 1 <= asked < b["parts"][0]["text_ids"].numel() / 2 and said == [(asked, len(processor.tokenizer))]


def test_a_swapped_sentence_is_scored_or_not():
    rows = 40
    ids = torch.arange(10, 20).repeat(rows, 1)
    for mismatched in (True, False):
        part = {"text_ids": ids, "text_words": torch.arange(10).repeat(rows, 1), "matched": torch.arange(rows) % 2 == 0}
        MLM(mask=0.5, mismatched=mismatched).corrupt(part, [np.random.default_rng(n) for n in range(rows)], Words())
        scored = (part["word_labels"] >= 0).any(1)
        assert scored[::2].all() and scored[1::2].any().item() is mismatched


def test_as_many_sentences_are_swapped_for_those_of_other_groups_as_the_rate_says(system, source):
    model, processor = system("visual_bert")
    rate = next(o.rate for o, _ in model.passes[0].objectives if o.name == "itm")
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    swapped = 0
    for position in range(len(samples)):
        sample, row = samples[0, position], source.pair(int(samples.rows[position]))
        part = sample["parts"][0]
        assert bool(part["matched"]) == (part["text"] == row.caption)
        swapped += not part["matched"]
    assert rate - 0.1 < swapped / len(samples) < rate + 0.1


def test_one_forward_serves_all_objectives_of_a_pass(system, source):
    model, processor = system("lxmert")
    b, runs = batch(source, model, processor, range(4), drawn=(0,)), []
    cross = model.schedule.cross[0]
    handle = cross.register_forward_hook(lambda *_: runs.append(1))
    model(**b)
    handle.remove()
    assert len(model.passes[0].objectives) == 4 and runs == [1]


def test_a_pass_of_text_alone_never_looks_at_the_picture(system, source):
    model, processor = system("vl_bert")
    model.eval()
    b = batch(source, model, processor, range(4))
    logs = model(**b)["losses"]
    b["pixel_values"] = 255 - b["pixel_values"]
    changed = model(**b)["losses"]
    assert changed["text/mlm"].equal(logs["text/mlm"]) and not changed["mlm"].equal(logs["mlm"])


@pytest.mark.parametrize("draw", [True, False])
def test_passes_are_drawn_by_share_one_for_each_optimiser_step(draw):
    sampler = EpochSampler(4000, seed=3, shares=[3, 1], rows=4, draw=draw)
    items = list(sampler)
    assert sorted(position for _, position, _ in items) == list(range(4000))
    steps = [{number for *_, number in items[at : at + 4]} for at in range(0, 4000, 4)]
    assert all(len(step) == 1 for step in steps)
    counts = Counter(next(iter(step)) for step in steps)
    assert counts[0] == (750 if not draw else pytest.approx(750, abs=50))
    assert items == list(EpochSampler(4000, seed=3, shares=[3, 1], rows=4, draw=draw))  # a resumed run draws the same
    sampler.set_epoch(1)
    assert [n for *_, n in sampler] != [n for *_, n in items] or not draw


def test_only_the_drawn_pass_is_prepared_and_logged(system, source):
    model, processor = system("uniter")
    b = batch(source, model, processor, range(4), drawn=(1,))
    assert b["parts"][0] is None and b["parts"][2] is None and "matched" in b["parts"][1]
    assert {"swap/itm", "swap/wra"} <= model(**b)["losses"].keys() and "mlm" not in model(**b)["losses"]


def test_two_that_limit_sight_cannot_share_a_forward():
    class Blind(Objective):
        def visibility(self, part, text_mask, image_mask):
            return None

    class AlsoBlind(Blind):
        pass

    with pytest.raises(UserError, match="cannot share one forward"):
        Pass([(Blind(), 1.0), (AlsoBlind(), 1.0)])


def test_an_objective_whose_part_is_missing_says_who_has_it(system):
    model, _ = system("blip")
    with pytest.raises(UserError, match=r"mlm needs the 'mlm' head.*Systems that have it: .*uniter"):
        MLM().check(model)
    with pytest.raises(UserError, match="has nothing to put in their place"):
        model.heads["mrfr"] = torch.nn.Identity()
        MRFR().check(model)


def test_a_run_goes_on_from_a_run_and_part_of_it_may_stay_frozen(source, shapes, text_tower, image_tower, tmp_path):
    settings = load_settings(find_recipe("visual_bert-small"))
    settings.data.source, settings.train.out = str(shapes), str(tmp_path / "first")
    settings.model = Composition(system="visual_bert", text=str(text_tower), image=str(image_tower), width=32, heads=4,
                                 layers=2, size=64, max_length=16)  # fmt: skip
    settings.train.steps, settings.train.batch, settings.train.evaluate = 3, 8, False
    first = train(settings)
    settings.model = Composition(start=str(first))
    settings.passes, settings.objectives = [], {"vqa": {}, "itm": {}}
    settings.train.out, settings.train.freeze = str(tmp_path / "second"), ["^text\\.", "joint.0"]
    second = train(settings)
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    same = {name for name in before.keys() & after.keys() if before[name].equal(after[name])}
    assert {n for n in after if n.startswith(("text.", "schedule.joint.0"))} <= same
    assert not any(n in same for n in after if n.startswith("schedule.joint.1.") and n.endswith("weight"))
    assert any(n.startswith("heads.answers.") for n in after) and not any(n.startswith("heads.mlm.") for n in after)
    with pytest.raises(UserError, match="no parameter has 'jiont' in its name"):
        build_from_run(settings.model, [], None, Learner)[0].freeze_named(["jiont"])


def test_a_question_is_swapped_as_often_as_a_caption_and_for_a_question(source, system):
    model, processor = system("lxmert")
    samples = Samples(source, "train", processor, model.passes, seed=0, augment=False)
    asked = {q.question for q in source.questions("train")}
    about = {source.pair(int(row)).caption for row in samples.rows}
    seen = Counter()
    for epoch in range(4):
        for row in range(0, len(samples), 2):
            part = samples[(epoch, row, 0)]["parts"][0]
            assert part["text"] in asked | about
            seen[part["text"] in asked, bool(part["matched"])] += 1
    swapped = [seen[kind, False] / (seen[kind, False] + seen[kind, True]) for kind in (True, False)]
    assert min(sum(seen[kind, ok] for ok in (True, False)) for kind in (True, False)) > 100  # half are questions
    assert all(0.1 < share < 0.3 for share in swapped)  # a fifth of either


def test_one_hidden_region_alone_spoils_no_mean(source, system):
    model, processor = system("uniter")
    at = next(n for n, one in enumerate(model.passes) if any(o.name == "mrfr" for o, _ in one.objectives))
    one = batch(source, model, processor, [0], drawn=(at,))
    assert int(one["parts"][at]["hidden"].sum()) >= 1
    for few in (1, 0):
        hidden = one["parts"][at]["hidden"]
        hidden.view(-1)[hidden.view(-1).nonzero()[few:, 0]] = False
        one["parts"][at]["totals"] = model.passes[at].totals(one["parts"][at], one)
        logged = model(**one)["losses"]
        found = [float(value) for name, value in logged.items() if name.endswith("mrfr_r2")]
        assert len(found) == 1 and abs(found[0]) <= 1


def test_the_whole_picture_does_not_tell_what_is_hidden(system):
    image = system("vilbert")[0].image.eval()
    cells = len(image.boxes) - 1
    states = torch.randn(2, cells, image.tower.config.hidden_sizes[-1], generator=torch.Generator().manual_seed(0))
    other = states.clone()
    other[0, 2] += 1
    other[1, 0] += 1
    hidden = torch.zeros(2, 1 + cells, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 1] = True
    with torch.no_grad():
        read, again = (image(None, states=given, hidden=hidden) for given in (states, other))
        assert torch.equal(read, again)
        assert not torch.allclose(image(None, states=states)[:, 0], image(None, states=other)[:, 0], atol=1e-3)
        assert not torch.allclose(read[:, 0], image(None, states=states)[:, 0], atol=1e-4)
