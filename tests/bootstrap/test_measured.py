"""The measurement counts what it says; no model is trained for it here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is no part of the installed package

from bench import capfilt
from interlace.data.sources import open_source
from tests.bootstrap.conftest import read_lines


def test_found_is_what_counting_says(cleaned, noisy):
    folder, report = cleaned
    # the threshold was given here, so nothing was fitted
    (folder / "report.json").write_text((folder / "report.json").read_text().replace('"threshold": {', '"threshold": {'
                                                                                     '"auc": 0.5,', 1))  # fmt: skip
    counted = capfilt.found(folder, noisy, "match")
    lines = {line["id"]: line for line in read_lines(folder / "lineage.jsonl")}
    wrong = {p.id for p in noisy.pairs("train") if p.caption != p.attributes["caption_true"]}
    flagged = {p.id for p in noisy.pairs("train") if lines[p.id]["match_web"] < report.threshold["threshold"]}
    assert counted["precision"] == pytest.approx(len(flagged & wrong) / len(flagged))
    assert counted["recall"] == pytest.approx(len(flagged & wrong) / len(wrong))
    rows, share = capfilt.wrong_share(folder)
    kept = {p.id for p in open_source(folder).pairs("train")}
    assert rows == len(kept) and share == pytest.approx(len(kept & wrong - flagged) / len(kept))


def test_the_best_there_could_be_is_the_table_without_its_wrong_rows(noisy_folder, noisy, tmp_path):
    best = open_source(capfilt.true_rows(noisy_folder, tmp_path / "truth"))
    assert len(noisy) - len(best) == sum(noisy.attribute("corrupted")) and not any(best.attribute("corrupted"))
    assert len(best.indices("test")) == len(noisy.indices("test"))


def test_seeds_are_shown_by_mean_and_range():
    assert capfilt.spread([0.1, 0.3], 100) == "20 [10 to 30]" and capfilt.spread([2.0, 2.0], 1, 1, True) == "+2.0"
    assert capfilt.spread([None, None]) == "-"
    row = {"filter": "blip", "judged by": "match", "flagged": 0.5, "precision": 0.5, "recall": 1.0, "area": 0.75,
           "held-out area": 0.9, "keep": 1, "replace": 2, "drop": 3}  # fmt: skip
    table = {"rows": 10, "wrong": 0.3, "R@1": 1.0, "R@5": 2.0, "R@10": 30.0}
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
