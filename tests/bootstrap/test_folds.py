"""Filters that judge what they did not learn from."""

import shutil

import numpy as np
import pytest
import yaml

from interlace.bootstrap import Decision, Finetune, bootstrap
from interlace.bootstrap.folds import Filters, fold_of, without
from interlace.bootstrap.models import filter_of_fold, settings_for
from interlace.errors import UserError
from interlace.run import Run
from tests.bootstrap.conftest import read_lines


def test_a_group_is_of_one_fold_and_folds_are_about_as_large(noisy):
    rows = noisy.indices("train")
    of = fold_of(noisy, rows, 3)
    by_group: dict[str, set[int]] = {}
    for row, fold in zip(rows, of):
        by_group.setdefault(noisy.group(int(row)), set()).add(int(fold))
    assert all(len(folds) == 1 for folds in by_group.values())
    sizes = [sum(folds == {n} for folds in by_group.values()) for n in range(3)]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(fold_of(noisy, rows[::-1], 3), of[::-1])


def test_a_fold_leaves_the_training_split_and_nothing_else_changes(noisy):
    rows = noisy.indices("train")
    of = fold_of(noisy, rows, 3)
    for fold in range(3):
        rest = without(noisy, fold, 3)
        np.testing.assert_array_equal(rest.indices("train"), rows[of != fold])
        np.testing.assert_array_equal(rest.indices("val"), noisy.indices("val"))
        assert rest.fingerprint != noisy.fingerprint
    np.testing.assert_array_equal(noisy.indices("train"), rows)


def test_each_row_is_judged_by_the_filter_of_its_fold(noisy, pretrained, tmp_path):
    how = Finetune(steps=2, batch=8, lr=1e-3)
    report = bootstrap(pretrained, noisy, tmp_path / "new", finetune=how, folds=2, write=False, batch=16,
                       decision=Decision(threshold=0.0, sheet=0), progress=False)  # fmt: skip
    runs = [Run.load(tmp_path / f"new/.bootstrap/filter-{n}") for n in (1, 2)]
    assert runs[0].fingerprint != runs[1].fingerprint and report.verdicts["keep"]
    lines = {line["id"]: line for line in read_lines(tmp_path / "new/lineage.jsonl")}
    rows = noisy.indices("train").tolist()
    asked = {row: [noisy.pair(row).caption] for row in rows if noisy.pair(row).caption.strip()}
    for row, (score,) in Filters(noisy, runs).score_pairs(asked, 16):
        assert lines[noisy.pair(row).id]["match_web"] == pytest.approx(score[0], abs=2e-6)


def test_a_filter_of_a_fold_begins_where_the_first_run_did_and_what_was_frozen_stays_so(noisy, pretrained, tmp_path):
    on = tmp_path / "on"
    shutil.copytree(pretrained, on)  # a run that went on from the pre-trained one
    config = yaml.safe_load((on / "config.yaml").read_text())
    config["model"]["start"], config["train"]["freeze"] = str(pretrained), ["^text.words"]
    (on / "config.yaml").write_text(yaml.safe_dump(config))
    how = Finetune(steps=1, batch=8, lr=1e-3)
    filter_of_fold(Run.load(on), noisy, 1, 2, {}, tmp_path / "filter", how, 0)
    begun = yaml.safe_load((tmp_path / "filter/config.yaml").read_text())
    first = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert begun["model"]["start"] == first["model"]["start"] == "" and begun["model"]["system"] == "blip"
    assert settings_for(Run.load(on), "captioner", {}, tmp_path / "c", how, 0).train.freeze == ["^text.words"]


def test_folds_want_fine_tuning_on_the_table_itself(noisy, pretrained, tmp_path):
    for wrong in ({"folds": 3}, {"folds": 1, "finetune": Finetune()},
                  {"folds": 2, "finetune": Finetune(), "clean": noisy}):  # fmt: skip
        with pytest.raises(UserError, match="2 or more filters"):
            bootstrap(pretrained, noisy, tmp_path / "new", write=False, **wrong)
