"""Extraction: complete, resumable, each picture once; bad pictures are listed and end nothing."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from interlace.cli import main
from interlace.data.sources import open_source
from interlace.errors import Stopped, UserError
from interlace.regions import BadRegions, RegionArrays, RegionStore, extract
from interlace.regions.grid import GridExtractor
from tests.regions.makers import photograph, write_photographs, write_yolos

HALF = np.array([[0, 0, 1, 0.5], [0, 0.5, 1, 1]], np.float32)


class Means:
    """Means of the upper and the lower half, in colours; counts what it is asked for."""

    features_size, beliefs_size, hint = 3, 0, 64

    def __init__(self, act=None, **facts):
        self.facts = {"kind": "means", **facts}
        self.seen, self.act = 0, act

    def __call__(self, pictures):
        self.seen += len(pictures)
        if self.act:
            self.act(self, pictures)
        halves = [np.asarray(p, np.float32).mean(1) for p in pictures]
        return [RegionArrays(np.stack([h[: len(h) // 2].mean(0), h[len(h) // 2 :].mean(0)]), HALF) for h in halves]


def test_every_row_has_its_pictures_regions(photographs, tmp_path):
    source, out = open_source(photographs), tmp_path / "out"
    report = extract(source, Means(), out, batch=2, progress=False)
    assert (report.rows, report.pictures, report.added, report.n_skipped) == (5, 5, 5, 0)
    assert report.regions == (2, 2.0, 2) and report.bytes > 0 and report.seconds > 0
    store = RegionStore.open(out)
    assert store.fingerprint == report.fingerprint and store.missing(source) == []
    for n, row in enumerate(source.pairs()):
        want = np.asarray(Image.open(photographs / f"p{n}.png"), np.float32)
        upper = want[: len(want) // 2].mean((0, 1))
        assert np.allclose(store.of(row).features[0], upper, atol=0.2)
        assert np.array_equal(store.get(row.id).features, store.of(row).features)


def test_the_second_run_asks_for_nothing(photographs, tmp_path):
    source = open_source(photographs)
    extract(source, Means(), tmp_path / "out", progress=False)
    again = Means()
    report = extract(source, again, tmp_path / "out", progress=False)
    assert again.seen == 0 and report.unchanged == 5 and report.rows == 5


def test_new_and_changed_pictures_are_extracted_again(photographs, tmp_path):
    extract(open_source(photographs), Means(), tmp_path / "out", progress=False)
    photograph(80, 80, seed=50).save(photographs / "p1.png")
    with open(photographs / "pairs.csv", "a") as file:
        file.write("row5,p5.png,new\n")
    photograph(80, 80, seed=51).save(photographs / "p5.png")
    source, again = open_source(photographs), Means()
    report = extract(source, again, tmp_path / "out", progress=False)
    assert again.seen == 2 and report.rows == 6
    now = np.asarray(photograph(80, 80, seed=50), np.float32)[:40].mean((0, 1))
    assert np.allclose(RegionStore.open(tmp_path / "out").get("row1").features[0], now, atol=0.2)


def test_rows_of_one_picture_share_its_regions(photographs, tmp_path):
    rows = [{"id": f"c{n}", "image": f"p{n % 2}.png", "caption": f"caption {n}"} for n in range(6)]
    with open(photographs / "pairs.csv", "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    means = Means()
    report = extract(open_source(photographs), means, tmp_path / "out", progress=False)
    assert means.seen == 2 and (report.rows, report.pictures) == (6, 2)
    store = RegionStore.open(tmp_path / "out")
    assert len(store) == 2 and np.array_equal(store.get("c0").features, store.get("c4").features)


def test_a_moved_folder_is_found_by_ids(photographs, tmp_path):
    extract(open_source(photographs), Means(), tmp_path / "out", progress=False)
    moved = tmp_path / "moved"
    shutil.copytree(photographs, moved)
    shutil.rmtree(photographs)
    source, again = open_source(moved), Means()
    assert extract(source, again, tmp_path / "out", progress=False).unchanged == 5 and again.seen == 0
    assert len(RegionStore.open(tmp_path / "out").of(source.pair(3))) == 2


def test_ids_of_another_table_do_not_lend_their_features(photographs, tmp_path):
    extract(open_source(photographs), Means(), tmp_path / "out", progress=False)
    other = open_source(write_photographs(tmp_path / "other", [(50, 51), (52, 53)]))  # row0, row1 too
    with pytest.raises(BadRegions, match="of another picture"):
        RegionStore.open(tmp_path / "out").of(other.pair(0))
    means = Means()
    extract(other, means, tmp_path / "out", progress=False)  # into the same store: told apart by their files
    store = RegionStore.open(tmp_path / "out")
    assert means.seen == 2 and len(store) == 7
    first = np.asarray(Image.open(photographs / "p0.png"), np.float32)
    upper = first[: len(first) // 2].mean((0, 1))
    assert np.allclose(store.of(open_source(photographs).pair(0)).features[0], upper, atol=0.2)


def test_bad_pictures_are_listed_with_their_reasons(photographs, tmp_path, capsys):
    data = (photographs / "p0.png").read_bytes()
    (photographs / "p0.png").write_bytes(data[: len(data) // 2])
    (photographs / "p2.png").write_text("<html>")

    def odd(means, pictures):
        if any(p.size == (50, 70) for p in pictures):
            raise RuntimeError("no such shape")

    report = extract(open_source(photographs), Means(odd), tmp_path / "out", batch=5)
    assert report.added == 2 and report.n_skipped == 3
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {one["id"]: one["reason"] for one in listed} == {
        "row0": "truncated",
        "row2": "not a picture (HTML)",
        "row3": "the extractor refused it (no such shape)",
    }
    assert listed[0]["path"] == str(photographs / "p0.png")
    said = capsys.readouterr().out
    assert "2 new, 3 skipped" in said and "skipped 1: truncated" in said and f"fingerprint {report.fingerprint}" in said
    assert RegionStore.open(tmp_path / "out").missing(open_source(photographs)) == ["row0", "row2", "row3"]


def test_rows_whose_picture_is_missing_are_listed_too(photographs, tmp_path, capsys):
    (photographs / "p1.png").unlink()
    report = extract(open_source(photographs), Means(), tmp_path / "out")
    assert report.added == 4 and report.n_skipped == 0 and report.left_out == 1
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in listed] == ["missing file: p1.png"] and "row" in listed[0]
    said = capsys.readouterr().out
    assert "left out by the table 1" in said and "missing file: p1.png" in said and "skipped.jsonl" in said


def test_regions_that_are_not_finite_are_skipped(photographs, tmp_path):
    class Nan(Means):
        def __call__(self, pictures):
            found = super().__call__(pictures)
            found[1].features[0, 0] = np.nan
            found[2].boxes = HALF[:, [2, 1, 0, 3]]
            return found

    report = extract(open_source(photographs), Nan(), tmp_path / "out", progress=False)
    assert report.added == 3
    assert "NaN" in report.skipped[0][2] and "corners in the wrong order" in report.skipped[1][2]


def test_an_extractor_that_refuses_all_is_an_error_and_no_list(photographs, tmp_path):
    def broken(means, pictures):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        extract(open_source(photographs), Means(broken), tmp_path / "out", progress=False)


def test_not_one_picture(photographs, tmp_path):
    for file in photographs.glob("*.png"):
        file.write_text("<html>")
    with pytest.raises(UserError, match=r"Not one of the 5 pictures could be used: not a picture \(HTML\) \(5\)"):
        extract(open_source(photographs), Means(), tmp_path / "out", progress=False)


def test_another_extractor_another_folder(photographs, tmp_path):
    source = open_source(photographs)
    extract(source, Means(), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"holds regions of another extractor.*Choose another folder"):
        extract(source, Means(sharper=True), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="holds something else"):
        extract(source, Means(), photographs, progress=False)
    with pytest.raises(UserError, match="at least 1 picture"):
        extract(source, Means(), tmp_path / "new", batch=0, progress=False)


def test_one_writer_at_a_time(photographs, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(UserError, match="Another process is writing"):
        extract(open_source(photographs), Means(), tmp_path / "out", progress=False)


def test_an_error_on_the_way_keeps_what_was_committed(photographs, tmp_path):
    def fail(means, pictures):
        if means.seen > 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        extract(open_source(photographs), Means(fail), tmp_path / "out", batch=1, progress=False, commit_seconds=0)
    assert len(RegionStore.open(tmp_path / "out")) == 2
    again = Means()
    extract(open_source(photographs), again, tmp_path / "out", progress=False)
    assert again.seen == 3 and len(RegionStore.open(tmp_path / "out")) == 5


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_a_commit(photographs, tmp_path, number, status):
    def stop(means, pictures):
        if means.seen == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="continues from there") as stopped:
        extract(open_source(photographs), Means(stop), tmp_path / "out", batch=1, progress=False)
    assert stopped.value.exit_code == status and len(RegionStore.open(tmp_path / "out")) == 2
    again = Means()
    extract(open_source(photographs), again, tmp_path / "out", progress=False)
    assert again.seen == 3


def slowly(photographs, out):
    """Commits three pictures, then hangs in the fourth."""

    def hang(means, pictures):
        if means.seen > 3:
            time.sleep(600)

    extract(open_source(photographs), Means(hang), out, batch=1, progress=False, commit_seconds=0)


def test_a_kill_loses_nothing_that_was_committed(photographs, tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(photographs, out))
    process.start()
    while process.is_alive() and len(list(out.glob("chunk-*.safetensors"))) < 3:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert len(RegionStore.open(out)) == 3
    again = Means()
    report = extract(open_source(photographs), again, out, progress=False)
    assert again.seen == 2 and report.rows == 5 and RegionStore.open(out).missing(open_source(photographs)) == []


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_with_a_tower(photographs, vit, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["extract", str(photographs), str(out), "--tower", str(vit)]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "5 rows, 5 pictures, 8 to 16 (mean 10.4) regions each" in said and "5 new" in said and "tower vit" in said
    assert main(given) == 0 and "5 unchanged" in capsys.readouterr().out
    assert main([*given, "--size", "48"]) == 2
    assert "another extractor" in capsys.readouterr().err
    store = RegionStore.open(out)
    store.require(GridExtractor(vit).fingerprint, features=16)
    wide = store.get("row0")  # 96 x 48: two rows of four cells
    assert wide.boxes[0].tolist() == [0, 0, 0.25, 0.5] and len(wide) == 8


def test_the_command_with_a_detector(photographs, tmp_path, capsys):
    yolos = write_yolos(tmp_path / "yolos")
    given = ["extract", str(photographs), str(tmp_path / "out"), "--detector", str(yolos), "--regions", "4"]
    assert main(given) == 0
    store = RegionStore.open(tmp_path / "out")
    regions = store.get("row2")
    assert store.beliefs_size == 6 and 1 <= len(regions) <= 4 and regions.objects.dtype == np.int32
    assert len(store.facts["classes"]) == 5
    for wrong, message in ((["--tower", "x"], "give one"), (["--regions", "0"], "at least 1 region")):
        assert main([*given, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["extract", str(photographs), str(tmp_path / "new"), "--regions", "36"]) == 2
    assert "--regions is for a detector" in capsys.readouterr().err
