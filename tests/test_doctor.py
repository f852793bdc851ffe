"""The examination before a run: healthy settings pass, and each fault is found by the line that should find it."""

import dataclasses

import pytest

from interlace.compose import Composition
from interlace.data.sources import open_source
from interlace.doctor import FAIL, OK, WARN, examine
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
