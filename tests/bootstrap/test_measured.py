"""The measurement counts what it says; no model is trained for it here."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is no part of the installed package

from bench import capfilt
from interlace.data.sources import open_source
from tests.bootstrap.conftest import read_lines


def test_what_is_flagged_is_what_counting_says():
    scores, wrong = np.array([0.1, 0.2, 0.5, 0.6, 0.9]), np.array([True, False, False, True, False])
    counted = capfilt.counted(scores, wrong, 0.5)
    assert counted == pytest.approx({"flagged": 0.4, "precision": 0.5, "recall": 0.5, "area": 4 / 6})
    assert capfilt.counted(scores, wrong, 0.0)["precision"] is None


def test_a_filter_is_asked_about_each_row_it_learnt_from(pretrained, noisy, once, tmp_path):
    rows = capfilt.judged(pretrained, noisy, tmp_path / "judged.json")
    assert [row["judged by"] for row in rows] == ["match", "cosine"]
    lines = [line for line in read_lines(once.folder / "lineage.jsonl") if "match_web" in line]
    wrong = {p.id: p.caption != p.attributes["caption_true"] for p in noisy.pairs()}
    for row in rows:
        scores = np.array([line[f"{row['judged by']}_web"] for line in lines])
        again = capfilt.counted(scores, np.array([wrong[line["id"]] for line in lines]), row["threshold"])
        assert again["area"] == pytest.approx(row["area"], abs=0.01)  # beside other texts: the last digits differ
    assert capfilt.judged(pretrained, noisy, tmp_path / "judged.json") == rows


def test_what_is_in_a_table_is_counted_by_the_truth(cleaned, noisy):
    folder, _ = cleaned
    lines = {line["id"]: line for line in read_lines(folder / "lineage.jsonl")}
    wrong = {p.id for p in noisy.pairs("train") if p.caption != p.attributes["caption_true"]}
    kept = {p.id for p in open_source(folder).pairs("train")}
    new = {id for id in kept if lines[id]["verdict"] == "replace"}
    assert capfilt.what_is_in(folder) == pytest.approx(
        {"rows": len(kept), "wrong": len((kept & wrong) - new) / len(kept), "replaced": len(new) / len(kept)})


def test_the_best_there_could_be_is_the_table_without_its_wrong_rows(noisy_folder, noisy, tmp_path):
    best = open_source(capfilt.rewritten(noisy_folder, tmp_path / "truth",
                                         lambda row: None if row["corrupted"] == "yes" else row))  # fmt: skip
    assert len(noisy) - len(best) == sum(noisy.attribute("corrupted")) and not any(best.attribute("corrupted"))
    assert len(best.indices("test")) == len(noisy.indices("test"))


def test_the_table_before_anything_was_exchanged(noisy_folder, noisy, few, tmp_path):
    whole = open_source(capfilt.rewritten(noisy_folder, tmp_path / "whole",
                                          lambda row: {**row, "caption": row["caption_true"], "corrupted": "no"}))
    true = {pair.id: pair.caption for pair in open_source(few).pairs()}
    assert {pair.id: pair.caption for pair in whole.pairs()} == true
    assert any(pair.caption != true[pair.id] for pair in noisy.pairs())


def test_seeds_are_shown_by_mean_and_range():
    assert capfilt.spread([0.1, 0.3], 100) == "20 [10 to 30]" and capfilt.spread([2.0, 2.0], 1, 1, True) == "+2.0"
    assert capfilt.spread([None, None]) == "-"
    row = {"filter": "blip", "judged by": "match", "flagged": 0.5, "precision": 0.5, "recall": 1.0, "area": 0.75,
           "area, validation": 0.9}  # fmt: skip
    table = {"rows": 10, "wrong": 0.3, "replaced": 0.0, "R@1": 1.0, "R@5": 2.0, "R@10": 30.0}
    gained = [{"learnt from": "noisy table", **table}, {"learnt from": "cleaned", **table, "R@10": 34.0}]
    filters, tables = capfilt.summary([{"seed": 0, "found": [row], "gained": gained}])
    assert filters[0]["precision"] == "50" and filters[0]["area"] == "0.75"
    assert tables[0]["against noisy, R@10"] is None and tables[1]["against noisy, R@10"] == "+4.0"


def test_figures_go_between_their_marks_and_only_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{capfilt.START}\nold\n{capfilt.END}\nafter\n")
    capfilt.onto_page(page, r"new \1")
    assert page.read_text() == f"before\n{capfilt.START}\nnew \\1\n{capfilt.END}\nafter\n"
    capfilt.onto_page(page, "newer")
    assert "new \\1" not in page.read_text() and page.read_text().count(capfilt.START) == 1
