"""A table cleaned by what learnt from it: complete lineage, verdicts that follow from scores, no kill that shows."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from interlace.bootstrap import Decision, Finetune, bootstrap
from interlace.bootstrap.bootstrap import doubt, verdict_of
from interlace.cli import main
from interlace.data.check import check
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.train import train
from tests.bootstrap.conftest import read_lines
from tests.conftest import toy_settings

TABLE = ("pairs.csv", "questions.jsonl", "lineage.jsonl", "skipped.jsonl", "review.html", "LICENCE.txt", "report.json")


def files(folder):
    """All of the table, its own place and its runs' aside."""
    return {name: (folder / name).read_bytes() for name in TABLE}


def test_every_row_has_its_history_and_its_verdict_follows_from_it(cleaned, noisy, middle):
    folder, report = cleaned
    lines = {line["id"]: line for line in read_lines(folder / "lineage.jsonl")}
    assert len(lines) == len(noisy)
    kept = {p.id: p for p in open_source(folder).pairs()}
    counts = dict.fromkeys(("keep", "replace", "drop", "bad"), 0)
    for pair in noisy.pairs():
        line = lines[pair.id]
        assert line["web"] == pair.caption
        if pair.split != "train":
            assert line["verdict"] == "untouched" and kept[pair.id].caption == pair.caption
            continue
        web, new = line["match_web"] >= middle, (line["match_synthetic"] or -1) >= middle
        assert line["verdict"] == ("keep" if web else "replace" if new else "drop")
        counts[line["verdict"]] += 1
        text = {"keep": pair.caption, "replace": line["synthetic"], "drop": ""}[line["verdict"]]
        assert line["text"] == text and -1 <= line["cosine_web"] <= 1
        assert (pair.id in kept) == (line["verdict"] != "drop")
        if pair.id in kept:
            assert kept[pair.id].caption == text
            assert kept[pair.id].attributes["match_web"] == pytest.approx(line["match_web"], abs=1e-6)
    assert counts == report.verdicts and counts["keep"] and counts["keep"] < sum(counts.values())


def test_the_new_table_opens_checks_clean_and_keeps_what_is_not_a_caption(cleaned, noisy):
    folder, report = cleaned
    table = open_source(folder)
    assert table.n_problems == 0 and not check(table).errors and len(table) == report.rows
    assert {k: table.columns[k] for k in noisy.columns} == noisy.columns  # and their types
    before = {p.id: p for p in noisy.pairs()}
    for pair in table.pairs():
        old = before[pair.id]
        assert (pair.split, pair.group, pair.name, pair.picture) == (old.split, old.group, old.name, old.picture)
        assert {k: pair.attributes[k] for k in old.attributes} == old.attributes
    ids = {p.id for p in table.pairs()}
    expected = [(q.id, q.question, q.answers, q.kind) for q in noisy.questions() if q.pair_id in ids]
    assert [(q.id, q.question, q.answers, q.kind) for q in table.questions()] == expected
    assert report.questions + report.questions_lost == noisy.n_questions
    assert "drawn for the tests" in (folder / "LICENCE.txt").read_text()


def test_a_table_can_be_cleaned_twice(cleaned, pretrained, tmp_path):
    again = bootstrap(pretrained, open_source(cleaned[0]), tmp_path / "again", decision=Decision(threshold=0.0),
                      batch=16, progress=False)  # fmt: skip
    table = open_source(again.folder)
    assert {"verdict", "verdict_before", "text_web_before"} <= set(table.columns)
    assert not (set(table.attribute("verdict")) - {None, "keep"})


def test_another_threshold_costs_no_further_scores(cleaned, pretrained, noisy, middle):
    folder, first = cleaned
    scored = folder / ".bootstrap" / "scored.jsonl"
    before = scored.stat().st_mtime_ns
    report = bootstrap(pretrained, noisy, folder, decision=Decision(threshold=middle, both=True), batch=16,
                       progress=False)  # fmt: skip
    assert scored.stat().st_mtime_ns == before
    lines = read_lines(folder / "lineage.jsonl")
    added = [line["added"] for line in lines if "added" in line]
    assert report.added == len(added) and report.rows == first.rows + len(added)
    rows = {p.id: p for p in open_source(folder).pairs()}
    for line in lines:
        if "added" in line:
            assert rows[line["added"]].caption == line["synthetic"] and rows[line["id"]].caption == line["web"]
            assert rows[line["added"]].group == rows[line["id"]].group
    assert open_source(folder).n_questions == first.questions  # a second row asks nothing twice


def test_fitted_on_held_out_pairs_and_said_so(pretrained, noisy, tmp_path):
    report = bootstrap(pretrained, noisy, tmp_path / "clean", batch=16, progress=False)
    assert report.threshold["pairs"] == 2 * len(noisy.indices("val"))
    assert 0 <= report.threshold["auc"] <= 1 and "validation" in report.threshold["from"]
    assert "validation" in "\n".join(report.lines())


def test_a_threshold_nobody_passes_is_refused(pretrained, noisy, tmp_path):
    with pytest.raises(UserError, match=r"not one of the \d+ texts .*highest match: web 0\.\d+"):
        bootstrap(pretrained, noisy, tmp_path / "clean", decision=Decision(threshold=1.1), batch=16, progress=False)
    assert not (tmp_path / "clean" / "pairs.csv").exists()


def test_a_refused_threshold_leaves_the_table_that_was_there(cleaned, pretrained, noisy):
    folder, _ = cleaned
    before = files(folder)
    with pytest.raises(UserError, match="not one of"):
        bootstrap(pretrained, noisy, folder, decision=Decision(threshold=1.1), batch=16, progress=False)
    assert files(folder) == before


def test_pictures_that_cannot_be_read_are_counted_and_listed(pretrained, noisy_folder, tmp_path):
    table = tmp_path / "table"
    shutil.copytree(noisy_folder, table)
    with open(table / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    broken = [row for row in rows if row["split"] == "train"][5:7]
    for n, row in enumerate(broken):
        row["image"] = str(tmp_path / f"broken{n}.png")
        (tmp_path / f"broken{n}.png").write_bytes(b"" if n else b"no picture")
    with open(table / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    report = bootstrap(pretrained, open_source(table), tmp_path / "clean", decision=Decision(threshold=0.0), batch=16,
                       progress=False)  # fmt: skip
    assert report.verdicts["bad"] == 2
    listed = read_lines(report.folder / "skipped.jsonl")
    assert [line["id"] for line in listed] == [row["id"] for row in broken] and listed[1]["reason"] == "empty file"
    assert not {row["id"] for row in broken} & {p.id for p in open_source(report.folder).pairs()}


# ------------------------------------------------------------------------------------------------------------- kills


def test_killed_and_begun_again_it_is_the_same_table_byte_for_byte(pretrained, noisy_folder, noisy, middle, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    how = ["--no-finetune", "--batch", "4", "--threshold", str(middle), "--seed", "5"]
    bootstrap(pretrained, noisy, whole, decision=Decision(threshold=middle), batch=4, seed=5, progress=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "interlace.cli", "bootstrap", str(pretrained), str(noisy_folder), "--out",
               str(killed), *how]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    scored, deadline = killed / ".bootstrap" / "scored.jsonl", time.monotonic() + 240
    while not (scored.is_file() and scored.read_bytes().count(b"\n") >= 12):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
        if process.returncode is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1].decode()[-2000:])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    acknowledged = scored.read_bytes()
    with open(scored, "ab") as file:
        file.write(b'{"row": 1, "id": "to')  # as if it had died while writing
    assert not (killed / "pairs.csv").exists()
    assert main(["bootstrap", str(pretrained), str(noisy_folder), "--out", str(killed), *how]) == 0
    assert scored.read_bytes().startswith(acknowledged[: acknowledged.rindex(b"\n") + 1])
    assert scored.read_bytes() == (whole / ".bootstrap" / "scored.jsonl").read_bytes()
    assert files(killed) == files(whole)


def test_killed_while_the_table_is_written_there_is_none_rather_than_half(cleaned, pretrained, noisy, middle,
                                                                         monkeypatch):  # fmt: skip
    folder, _ = cleaned
    before = files(folder)
    for stop in ("pairs.csv", "review.html", "report.json"):
        (folder / "report.json").unlink()
        real = os.replace

        def die(source, to, stop=stop, real=real):
            if str(to).endswith(stop):
                raise KeyboardInterrupt
            real(source, to)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", die)
            patch.setattr("pathlib.Path.replace", lambda self, to: die(self, to))
            with pytest.raises(KeyboardInterrupt):
                bootstrap(pretrained, noisy, folder, decision=Decision(threshold=middle), batch=16, progress=False)
        assert (folder / "pairs.csv").exists() == (stop == "report.json")
        bootstrap(pretrained, noisy, folder, decision=Decision(threshold=middle), batch=16, progress=False)
        assert files(folder) == before


def test_a_finished_table_is_not_made_again(cleaned, pretrained, noisy, middle):
    folder, report = cleaned
    stamps = {name: (folder / name).stat().st_mtime_ns for name in TABLE}
    again = bootstrap(pretrained, noisy, folder, decision=Decision(threshold=middle), batch=16, progress=False)
    assert again == report and {name: (folder / name).stat().st_mtime_ns for name in TABLE} == stamps


# --------------------------------------------------------------------------------------------------------- the models


def test_both_models_go_on_from_the_run(pretrained, noisy, tmp_path):
    report = bootstrap(pretrained, noisy, tmp_path / "clean", finetune=Finetune(steps=2, batch=8),
                       named={"source": "shapes"}, decision=Decision(threshold=0.0), batch=16,
                       progress=False)  # fmt: skip
    start = load_file(pretrained / "model.safetensors")
    for role, moved, kept in (("captioner", "decoder.", "heads."), ("filter", "heads.match", "decoder.")):
        folder = report.folder / ".bootstrap" / role
        assert json.loads((folder / "run.json").read_text())["steps"] == 2
        state = load_file(folder / "model.safetensors")
        names = [n for n in state if n.startswith(moved)]
        assert names and any((state[n] != start[n]).any() for n in names)
        own = [n for n in state if n.startswith(kept)]
        assert all((state[n] == start[n]).all() for n in own)
    assert report.filter.endswith("filter") and report.captioner.endswith("captioner")


def test_runs_without_the_part_are_refused_by_name(pretrained, noisy_folder, noisy, text_tower, tmp_path):
    settings = toy_settings(noisy_folder, text_tower, tmp_path / "run", steps=1, batch=8, evaluate=False)
    run_folder = train(settings)
    with pytest.raises(UserError, match=r"lm objective.*--captioner"):  # contrast, match and answers, but no decoder
        bootstrap(run_folder, noisy, tmp_path / "clean", progress=False)
    report = bootstrap(pretrained, noisy, tmp_path / "clean", filter=run_folder, decision=Decision(threshold=0.0),
                       batch=16, progress=False)  # fmt: skip
    assert report.filter == str(run_folder) and report.captioner == str(pretrained)


def test_where_nothing_is_written_a_run_needs_no_decoder_and_rows_are_kept_or_dropped(pretrained, noisy, middle, once,
                                                                                     tmp_path):  # fmt: skip
    report = bootstrap(pretrained, noisy, tmp_path / "clean", decision=Decision(threshold=middle), batch=16,
                       write=False, progress=False)  # fmt: skip
    was = {line["id"]: line for line in read_lines(once.folder / "lineage.jsonl")}
    for line in read_lines(report.folder / "lineage.jsonl"):
        if line["verdict"] != "untouched":
            assert line["verdict"] == ("keep" if line["match_web"] >= middle else "drop") and line["synthetic"] == ""
            assert line["match_web"] == pytest.approx(was[line["id"]]["match_web"], abs=1e-5)
    assert report.verdicts["replace"] == 0 and not report.captioner
    with pytest.raises(UserError, match="--captioner and --both"):
        bootstrap(pretrained, noisy, tmp_path / "clean", decision=Decision(both=True), write=False)


def test_another_plan_wants_another_folder(cleaned, pretrained, noisy):
    with pytest.raises(UserError, match="seed was 0, is 1"):
        bootstrap(pretrained, noisy, cleaned[0], seed=1, batch=16, progress=False)
    with pytest.raises(UserError, match=r"top_p was 0\.9, is 0\.5"):
        bootstrap(pretrained, noisy, cleaned[0], top_p=0.5, batch=16, progress=False)


@pytest.mark.parametrize("options,says", [({"top_p": 0}, "above 0"), ({"max_length": 2}, "3 or more"),
                                          ({"batch": 0}, "1 or more"), ({"seed": -1}, "seed is from 0"),
                                          ({"finetune": Finetune(steps=0)}, "at least 1; got 0. .*--no-finetune"),
                                          ({"finetune": Finetune(batch=0)}, "batch of the fine-tuning is at least 1"),
                                          ({"finetune": Finetune(lr=-1)}, "lr of the fine-tuning is")])  # fmt: skip
def test_options_that_make_no_sense(pretrained, noisy, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        bootstrap(pretrained, noisy, tmp_path / "clean", **options)
    assert not (tmp_path / "clean").exists()


def test_more_folds_than_groups_are_refused(pretrained, noisy, tmp_path):
    groups = len({noisy.group(row) for row in noisy.indices("train").tolist()})
    with pytest.raises(UserError, match=rf"folds: at most as many as the train split of .* has groups, {groups}; got"):
        bootstrap(pretrained, noisy, tmp_path / "clean", write=False, folds=groups + 1, finetune=Finetune())
    assert not (tmp_path / "clean").exists()


def test_a_threshold_that_cannot_be_fitted_is_said_before_any_training(pretrained, noisy, noisy_folder, tmp_path):
    only_training = open_source(noisy_folder, split="train")
    for source, decision in ((only_training, Decision()), (noisy, Decision(labels="corrupted=perhaps"))):
        with pytest.raises(UserError, match=r"a threshold needs at least 10.*Give --threshold"):
            bootstrap(pretrained, source, tmp_path / "clean", finetune=Finetune(steps=2, batch=8), decision=decision)
        assert not (tmp_path / "clean").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(pretrained, noisy, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        bootstrap(pretrained, noisy, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_arithmetic_of_a_verdict():
    line = {"match_web": 0.4, "match_synthetic": 0.9}
    assert [verdict_of(line, "match", t) for t in (0.4, 0.41, 0.9, 0.91)] == ["keep", "replace", "replace", "drop"]
    assert verdict_of({"match_web": None, "match_synthetic": None}, "match", 0.0) == "drop"  # no words, no pass
    assert verdict_of({"bad": "truncated"}, "match", 0.0) == "bad"
    # a text that is kept is as sure as its own score; one that failed also as the score of what came in its place
    assert doubt(line, "match", 0.3) == pytest.approx(0.1) and doubt(line, "match", 0.85) == pytest.approx(0.05)
