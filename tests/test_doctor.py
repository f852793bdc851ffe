"""The examination before a run: healthy settings pass, and each fault is found by the line that should find it."""

import dataclasses

import pytest

from interlace import doctor as doctor_file
from interlace.compose import Composition
from interlace.data.sources import open_source
from interlace.doctor import FAIL, OK, WARN, examine
from interlace.objectives import LM
from interlace.objectives.lm import with_ends, words_scored
from tests.conftest import toy_settings


@pytest.fixture(scope="module")
def settings(shapes, text_tower, tmp_path_factory):
    made = toy_settings(shapes, text_tower, tmp_path_factory.mktemp("doctor") / "run", steps=40)
    made.model = dataclasses.replace(made.model, layers=2, dropout=0.0)
    return made


def verdicts(report):
    return {finding.what: finding.verdict for finding in report.findings}


def changed(settings, **parts):
    return dataclasses.replace(settings, **{name: dataclasses.replace(getattr(settings, name), **values)
                                            for name, values in parts.items()})  # fmt: skip


def test_healthy_settings_pass_every_line(settings, capsys):
    report = examine(settings, seconds=20, progress=False)
    report.show()
    found = verdicts(report)
    assert report.healthy, found
    assert found["itc by heart"] == found["itm by heart"] == found["vqa by heart"] == found["reload"] == OK
    assert found["gradients"] == OK and {"time", "memory", "captions", "questions"} <= found.keys()
    assert "itc by heart" in capsys.readouterr().out


def test_texts_that_are_cut_are_counted(settings):
    report = examine(changed(settings, model={"max_length": 4}), seconds=1, progress=False)
    assert verdicts(report)["captions"] == FAIL and not report.healthy
    line = next(finding for finding in report.findings if finding.what == "captions")
    assert "longer than 4 tokens" in line.says and "model.max_length=" in line.fix


def test_a_small_batch_is_named_for_what_compares_rows(settings):
    found = verdicts(examine(changed(settings, train={"batch": 4}), seconds=1, progress=False))
    assert found["batch"] == WARN


def test_a_frozen_model_does_not_learn_by_heart(settings):
    frozen = changed(settings, train={"freeze": ["^(?!heads.match.out.bias)"]})
    report = examine(frozen, seconds=10, progress=False)
    assert FAIL in {verdict for what, verdict in verdicts(report).items() if what.endswith("by heart")}


def test_one_group_has_no_wrong_pairs(settings, shapes, tmp_path):
    import csv
    import shutil

    shutil.copytree(shapes, tmp_path / "one")
    table = next((tmp_path / "one").glob("*.csv"))
    rows = list(csv.DictReader(table.open()))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0].keys() - {"group"}, "group"])
        writer.writeheader()
        writer.writerows({**row, "group": "all"} for row in rows)
    source = open_source(tmp_path / "one")
    report = examine(settings, source, seconds=1, progress=False)
    assert any(f.verdict == FAIL and "one group" in f.says for f in report.findings)


def test_a_decoder_writes_again_what_it_learned(shapes, text_tower, image_tower, settings):
    writes = dataclasses.replace(settings, passes=[{"lm": {"smoothing": 0.0}}], objectives={},
                                 model=Composition(system="vision_encoder_decoder", text=str(text_tower), layers=2,
                                                   image=str(image_tower), width=32, heads=4, size=64, dropout=0.0,
                                                   max_length=16))  # fmt: skip
    found = verdicts(examine(writes, seconds=40, progress=False))
    assert found["written ids"] == OK and found["lm by heart"] == OK and found["written again"] == OK


def of_writers(settings, text_tower, image_tower, objective, system, **changes):
    model = Composition(system=system, text=str(text_tower), layers=2, image=str(image_tower), width=32, heads=4,
                        size=64, dropout=0.0, max_length=16)  # fmt: skip
    return dataclasses.replace(settings, passes=[objective], objectives={}, model=dataclasses.replace(model, **changes))


WRITERS = [({"prefix_lm": {"prefix": "none"}}, "uniter"), ({"vqa_writes": {"smoothing": 0.0, "answers": 1}}, "blip")]


@pytest.mark.parametrize("objective, system", WRITERS)
def test_whatever_writes_writes_again_what_it_learned(objective, system, text_tower, image_tower, settings):
    report = examine(of_writers(settings, text_tower, image_tower, objective, system), seconds=60, progress=False)
    assert verdicts(report)["written again"] == OK, report


@pytest.mark.parametrize("config, words", [
    ("generation_config", "training's bos_token_id is 2, generation's 9"),
    ("config", "the decoder's bos_token_id is 9, the tokenizer's 2"),
])  # fmt: skip
def test_a_start_that_training_and_generation_do_not_share(config, words, text_tower, image_tower, settings,
                                                           monkeypatch):  # fmt: skip
    made = doctor_file.make_learner

    def broken(*given):
        learner, processor = made(*given)
        learner.decoder.generation_config.bos_token_id = 9
        if config == "config":
            learner.decoder.config.bos_token_id = 9
        return learner, processor

    monkeypatch.setattr(doctor_file, "make_learner", broken)
    writes = of_writers(settings, text_tower, image_tower, {"lm": {}}, "vision_encoder_decoder")
    report = examine(writes, seconds=1, progress=False)
    line = next(finding for finding in report.findings if finding.what == "written ids")
    assert line.verdict == FAIL and words in line.says


def test_labels_that_are_shifted_twice(text_tower, image_tower, settings, monkeypatch):
    """Training is content: it learns to say the word after the next. Generation shows it."""

    def twice(self, model, batch, views):
        part, image = views.part, views.image()
        ids = with_ends(part["lm_ids"], part["lm_mask"], model.decoder)
        states = model.decoder.states(ids[:, :-2], image.states, image.mask)
        asked = part["lm_scored"][:, 2:]
        return words_scored("lm", model.decoder.says(states[asked]), ids[:, 2:][asked], views.total(self), 0.0)

    monkeypatch.setattr(LM, "loss", twice)
    writes = of_writers(settings, text_tower, image_tower, {"lm": {}}, "vision_encoder_decoder")
    report = examine(writes, seconds=60, progress=False)
    line = next(finding for finding in report.findings if finding.what == "written again")
    assert verdicts(report)["lm by heart"] == OK and line.verdict == FAIL and "shifted twice" in line.fix


def test_a_new_part_that_may_not_learn_is_named(settings):
    report = examine(changed(settings, train={"freeze": ["^heads.match"]}), seconds=1, progress=False)
    line = next(finding for finding in report.findings if finding.what == "frozen")
    assert line.verdict == WARN and "heads.match" in line.says and "heads.contrast" not in line.says
    assert "frozen" not in verdicts(examine(changed(settings, train={"text_lr": 0.0}), seconds=1, progress=False))


def test_an_objective_without_its_part_is_said_and_ends_with_a_status(settings, capsys):
    assert doctor_file.doctor(dataclasses.replace(settings, objectives={}, passes=[{"mrfr": {}}]), seconds=1) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "FAIL settings" in said and "mrfr guesses the features of regions or cells" in said


@pytest.mark.parametrize("objective", ["itc", "itc_sigmoid"])
def test_every_contrast_over_a_batch_of_four_is_warned_of_and_a_queue_is_not(objective, settings):
    few = dataclasses.replace(changed(settings, train={"batch": 4}), objectives={objective: {"size": 8}})
    line = next(f for f in examine(few, seconds=0, progress=False).findings if f.what == "batch")
    assert line.verdict == WARN and f"{objective} chooses among 4 rows" in line.says and "itc_momentum" in line.fix
    queue = dataclasses.replace(few, objectives={"itc_momentum": {"size": 8, "queue": 64}})
    assert verdicts(examine(queue, seconds=0, progress=False))["batch"] == OK


def test_of_drawn_passes_a_step_costs_one(settings):
    passes = [{"share": 3, "itc": {"size": 8}}, {"share": 1, "name": "b", "itm": {"negatives": "drawn"}}]
    report = examine(dataclasses.replace(changed(settings, train={"mix": "draw"}), objectives={}, passes=passes),
                     seconds=1, progress=False)  # fmt: skip
    assert "; 2 passes, one a step" in next(f.says for f in report.findings if f.what == "time")


def test_the_time_of_heads_that_learn_first_is_told(settings):
    def told(**train):
        report = examine(changed(settings, train=train), seconds=0, progress=False)
        return next(f.says for f in report.findings if f.what == "time")

    assert "; before them heads learn alone, about" in told(heads_first=True)
    assert "learn alone" not in told(heads_first=False)


@pytest.mark.parametrize("first, low, learned", [(2.0, 0.9, True), (2.0, 1.1, False), (-0.2, -0.2, False),
                                                 (-0.2, -0.35, True), (0.01, 0.01, False), (0.01, -0.1, True)])
def test_what_counts_as_learned_by_heart(first, low, learned):
    assert doctor_file.has_learned(first, low) is learned
