"""The index: what is committed stays, what is unchanged is not embedded again, who may not write is told why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from PIL import Image
from squares import COLUMNS, ColourEncoder, ListSource

from interlace.data.rows import Pair, Picture
from interlace.errors import UserError
from interlace.search import Index, build_index, print_report, recall_against_exact, search
from interlace.search.filters import parse
from interlace.search.lock import writing
from interlace.search.rows import Row, fingerprints, new_column, table_of

HERE = Path(__file__).parent


def ids(index: Index) -> list[str]:
    return sorted(item.id for item in index)


def build(run, pairs, folder=None, **options):
    return build_index(run, ListSource(pairs), folder, progress=False, **options)


def test_build_open_and_get(run, squares):
    report = build(run, squares(30))
    assert (report.added, report.rows, report.n_skipped, report.partitions) == (30, 30, 0, None)
    assert report.folder == run.folder / "index"
    index = Index.open(run.folder / "index", run)
    assert len(index) == 30 and index.complete
    assert index.columns == COLUMNS
    item = index.get("item 3")
    assert item.caption == "a yellow square with number3"
    assert item.attributes == {"room": "Kitchen", "width_cm": 3.0, "foldable": False}
    assert item.picture.path.endswith("3.png") and item.split == "train" and item.group == "g3"
    assert Image.open(BytesIO(item.thumbnail)).format == "JPEG"
    assert index.get("item 99") is None
    assert index.get("x' OR '1'='1") is None
    np.testing.assert_allclose(
        index.vector("item 3"), run.encode_pictures([Image.open(item.picture.path)])[0], atol=1e-6
    )


def test_the_second_build_embeds_only_what_changed(run, squares):
    pairs = squares(20)
    build(run, pairs)
    run.pictures_encoded = 0
    source = ListSource(pairs)
    assert build_index(run, source, progress=False).unchanged == 20
    assert build_index(run, source, progress=False).unchanged == 20  # by the source's fingerprint alone
    encoded_by_calibration = run.pictures_encoded
    assert encoded_by_calibration == 0

    Image.new("RGB", (20, 20), (1, 2, 3)).save(pairs[5].picture.path)  # a new picture
    pairs[6] = replace(pairs[6], caption="new words", attributes={**pairs[6].attributes, "width_cm": 999.0})
    before = Index.open(run.folder / "index").vector("item 6")
    report = build(run, [*pairs[:10], *pairs[12:], *squares(22, 20)])
    assert (report.added, report.updated, report.relabelled, report.unchanged, report.removed) == (2, 1, 1, 16, 2)
    index = Index.open(run.folder / "index", run)
    assert ids(index) == sorted(f"item {i}" for i in range(22) if i not in (10, 11))
    assert index.get("item 6").caption == "new words" and index.get("item 6").attributes["width_cm"] == 999.0
    np.testing.assert_array_equal(index.vector("item 6"), before)
    np.testing.assert_allclose(
        index.vector("item 5"), run.encode_pictures([Image.open(pairs[5].picture.path)])[0], atol=1e-6
    )
    assert index.words("new words", 5)[0][0].id == "item 6"


def test_bad_pictures_are_skipped_counted_and_listed(run, squares, tmp_path, capsys):
    pairs = squares(10)
    Path(pairs[2].picture.path).write_bytes(b"")
    Path(pairs[3].picture.path).write_text("<!doctype html><p>404</p>")
    Path(pairs[4].picture.path).unlink()
    whole = Path(pairs[5].picture.path).read_bytes()
    Path(pairs[5].picture.path).write_bytes(whole[: len(whole) // 2])
    pairs.append(replace(pairs[0], caption="same id again"))
    report = build(run, pairs)
    assert report.rows == 6 and report.n_skipped == 5
    listed = [json.loads(line) for line in (report.folder / "skipped.jsonl").read_text().splitlines()]
    assert {s["id"]: s["reason"].split()[0] for s in listed} == {
        "item 2": "empty",
        "item 3": "not",
        "item 4": "missing",
        "item 5": "truncated",
        "item 0": "its",
    }
    assert all(s["path"] for s in listed)
    print_report(report)
    assert "5 skipped" in capsys.readouterr().out
    assert Index.open(report.folder).get("item 0").caption == pairs[0].caption  # the first of two equal ids is kept

    shown = build_index(run, ListSource(pairs), progress=True)  # the bar and the report as people see them
    assert shown.unchanged == 6 and shown.n_skipped == 5


def test_a_picture_gone_bad_keeps_its_earlier_row(run, squares):
    pairs = squares(6)
    build(run, pairs)
    Path(pairs[1].picture.path).write_bytes(b"")
    Path(pairs[2].picture.path).unlink()
    report = build(run, pairs)
    assert (report.rows, report.n_skipped, report.removed) == (6, 2, 0)


def test_when_nothing_can_be_read_the_reason_is_told(run, squares):
    pairs = squares(5)
    for pair in pairs:
        Path(pair.picture.path).unlink()
    with pytest.raises(UserError, match=r"Not one of the 5 pictures.*missing file \(5\)"):
        build(run, pairs)
    with pytest.raises(UserError, match="no pairs"):
        build(run, [])


def test_a_picture_the_encoder_refuses_does_not_end_the_run(run, squares):
    class Picky(ColourEncoder):
        def encode_pictures(self, pictures):
            if any(p.size == (33, 33) for p in pictures):
                raise RuntimeError("33 is not a size")
            vectors = super().encode_pictures(pictures)
            vectors[[p.size == (44, 44) for p in pictures]] = np.nan
            return vectors

    pairs = squares(10)
    Image.new("RGB", (33, 33)).save(pairs[4].picture.path)
    Image.new("RGB", (44, 44)).save(pairs[7].picture.path)
    report = build(Picky(run.folder), pairs)
    assert report.rows == 8
    assert {s.id: s.reason for s in report.skipped} == {
        "item 4": "the encoder refused it (33 is not a size)",
        "item 7": "the encoder gave no finite vector",
    }

    class Broken(ColourEncoder):
        def encode_pictures(self, pictures):
            raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):  # not the pictures' fault
        build(Broken(run.folder), pairs, run.folder / "other")


def test_pictures_that_are_only_bytes_are_kept(run, squares):
    pairs = squares(6)
    data = Path(pairs[0].picture.path).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(big := Path(pairs[1].picture.path).with_suffix(".large.png"))
    pairs[0] = replace(pairs[0], picture=Picture(data=data))
    pairs[1] = replace(pairs[1], picture=Picture(data=big.read_bytes()))
    build(run, pairs)
    index = Index.open(run.folder / "index", run)
    assert index.get("item 0").picture.data == data
    small = Image.open(BytesIO(index.get("item 1").picture.data))
    assert max(small.size) == 640
    assert build(run, pairs).unchanged == 6


def test_upsert_and_delete(run, squares):
    build(run, squares(10))
    index = Index.open(run.folder / "index", run)
    pairs = squares(14, 8)
    pairs[0].attributes["shape"] = "round"  # an attribute the index did not have
    pairs[1] = replace(pairs[1], caption="another caption")
    done = index.upsert([*pairs, pairs[1]])
    assert (done.added, done.updated, done.skipped) == (4, 2, [])
    assert ids(index) == sorted(f"item {i}" for i in range(14))
    assert index.get("item 9").caption == "another caption"
    assert index.columns["shape"] == "text" and index.get("item 8").attributes["shape"] == "round"
    assert index.count(parse("shape = round", index.filter_columns)) == 1
    assert index.delete(["item 8", "item 9", "nobody", "x' OR '1'='1"]) == 2
    assert len(index) == 12
    with pytest.raises(UserError, match="opened without a run"):
        Index.open(index.folder).upsert(pairs)
    assert build(run, squares(14)).added == 2  # a build mirrors the source again


def test_another_process_sees_each_commit(run, squares):
    build(run, squares(5))
    reader = Index.open(run.folder / "index", run)
    assert len(reader) == 5
    Index.open(run.folder / "index", run).upsert(squares(9, 5))
    assert len(reader) == 9
    build_index(run, ListSource(squares(3)), rebuild=True, progress=False)
    assert len(reader) == 3


def test_an_index_refuses_another_run(run, squares):
    build(run, squares(5))
    other = ColourEncoder(run.folder.parent / "other", seed=1)
    for attempt in (
        lambda: Index.open(run.folder / "index", other),
        lambda: build_index(other, ListSource(squares(5)), run.folder / "index", progress=False),
    ):
        with pytest.raises(UserError, match=r"another run.*--rebuild"):
            attempt()
    reader = Index.open(run.folder / "index", run)
    build_index(other, ListSource(squares(5)), run.folder / "index", rebuild=True, progress=False)
    Index.open(run.folder / "index", other)
    with pytest.raises(UserError, match="rebuilt with another run"):
        len(reader)


def test_a_path_is_no_run_and_no_source(run, squares):
    with pytest.raises(UserError, match=r"Expected a source, got 'table\.csv' \(str\)\. open_source\(path\) opens one"):
        build_index(run, "table.csv")
    with pytest.raises(UserError, match=r"Expected a loaded run, got 'runs/shop' \(str\)\. Run\.load\(path\)"):
        build_index("runs/shop", ListSource(squares(2)))
    assert not (run.folder / "index").exists()


def test_missing_half_written_and_foreign_folders(run, squares, tmp_path):
    with pytest.raises(UserError, match=r"No index at .*interlace index RUN SOURCE"):
        Index.open(tmp_path / "nowhere")
    build(run, squares(5))
    folder = run.folder / "index"
    (folder / "index.json").rename(folder / "away")
    with pytest.raises(UserError, match="not a complete index"):
        Index.open(folder)
    with pytest.raises(UserError, match="holds files that are no index's"):
        build(run, squares(5), folder)
    (folder / "away").unlink()
    assert build(run, squares(5), folder).added == 5  # a half-made index is replaced

    (folder / "index.json").write_text('{"format": 1, "run"')
    with pytest.raises(UserError, match="damaged"):
        Index.open(folder)
    build(run, squares(5), rebuild=True)
    index = Index.open(folder, run)
    for file in (folder / "lance" / "items.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Index.open(folder, run).nearest(np.ones(64), 3)
    for path in sorted((folder / "lance").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Index.open(folder, run)
    with pytest.raises(UserError, match="cannot be read"):
        len(index)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        build(run, squares(5), tmp_path / "mine", rebuild=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        build(run, squares(5), tmp_path / "file")


def test_the_second_writer_is_told_who_holds_the_lock(run, squares):
    folder = run.folder / "index"
    with writing(folder), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        build(run, squares(5))
    assert build(run, squares(5)).added == 5


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from squares import COLUMNS, ColourEncoder, ListSource, square
from interlace.search import build, build_index
build.COMMIT_ROWS = 40
pictures, n = Path({pictures!r}), {n}
run = ColourEncoder(Path({run!r}))
def told(ids):
    print(*ids, sep=",", flush=True)
    if ids[0] == "item 120":
        sys.stdin.read()  # the fourth commit is told; here the kill comes
build_index(run, ListSource([square(pictures, i) for i in range(n)]), batch=16, progress=False, committed=told)
print("finished", flush=True)
"""


def test_killed_builds_continue_and_lose_nothing(run, squares, tmp_path):
    pairs = squares(300)
    code = BUILD.format(root=str(HERE), pictures=str(tmp_path / "pictures"), n=300, run=str(run.folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    acknowledged = [i for _ in range(3) for i in process.stdout.readline().strip().split(",")]
    with pytest.raises(UserError, match=f"process {process.pid} on"):  # it is at work, and holds the lock
        build(run, pairs)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    acknowledged += [i for line in rest for i in line.split(",")]
    assert "finished" not in acknowledged and len(acknowledged) >= 120

    survived = ids(Index.open(run.folder / "index", run))
    assert set(acknowledged) <= set(survived) and len(survived) == len(set(survived))
    report = build(run, pairs)
    assert report.unchanged == len(survived) and report.added == 300 - len(survived)
    assert ids(Index.open(run.folder / "index", run)) == sorted(p.id for p in pairs)


def test_concurrent_upserts_of_the_same_new_ids(run, squares):
    """Through the interface the lock takes turns; and a writer that got past it still makes no duplicates."""
    build(run, squares(4))
    pairs = squares(24)
    writers = [Index.open(run.folder / "index", run) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: index.upsert(pairs), writers))
    assert ids(writers[0]) == sorted(p.id for p in pairs)

    rows = [Row(p, fingerprints(p), np.ones(64, dtype=np.float32) / 8, None, None) for p in squares(60, 24)]
    tables = [table_of(rows[9 * n : 9 * n + 9], 64, writers[0].manifest.columns) for n in range(4)]
    together = Barrier(4)

    def past_the_lock(index: Index) -> None:
        for table in tables:
            together.wait()
            index._merge(table)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(past_the_lock, writers))
    assert ids(writers[0]) == sorted(p.id for p in squares(60))


def random_index(folder: Path, run, n: int, exact_below: int) -> Index:
    """n random unit vectors, hardly clustered, written without pictures."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 64))[rng.integers(0, 20, n)] + 3 * rng.normal(size=(n, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = Index.create(folder, run, {"price": "number", "room": "text"}, exact_below=exact_below)
    words = ["red", "green", "blue", "black", "white"]
    for start in range(0, n, 1000):
        index.commit(
            [
                Row(
                    Pair(f"{i}", Picture(path=f"/none/{i}"), f"{words[i % 5]} thing", "", "train",
                         {"price": float(i), "room": "Garden" if i % 50 == 0 else "Hall"}, f"thing {i}"),
                    (i, i), vectors[i], None, None,
                )
                for i in range(start, min(n, start + 1000))
            ]
        )  # fmt: skip
    return index


def test_the_approximate_index_and_its_recall(run, tmp_path):
    from interlace.search import calibrate

    index = random_index(tmp_path / "index", run, 3000, exact_below=1000)
    assert index.searches_exactly() and recall_against_exact(index) == 1.0
    assert index.refresh_vector_index() and not index.searches_exactly()
    recall = calibrate.tune(index, run, n=40)
    assert recall >= 0.95 and index.manifest.vector_index.recall == recall
    assert recall_against_exact(index, n=50) >= 0.9
    index.manifest.vector_index.nprobes = 1  # the measurement can also be bad
    assert recall_against_exact(index, n=50) < 0.9

    narrow = parse("price < 60 or room = Garden", index.filter_columns)
    assert 0 < index.count(narrow) <= 1000 and index.searches_exactly(narrow)
    wide = parse("price >= 60", index.filter_columns)
    assert not index.searches_exactly(wide)
    query = index.vector("77")
    found = [(item.id, round(score, 5)) for item, score in index.nearest(query, 10, narrow)]
    assert found == [(item.id, round(score, 5)) for item, score in index.nearest(query, 10, narrow, exact=True)]
    allowed = {item.id for item in index if item.attributes["price"] < 60 or item.attributes["room"] == "Garden"}
    best = sorted(allowed, key=lambda i: -float(index.vector(i) @ query))[:10]
    assert {i for i, _ in found} == set(best)
    assert all(item.attributes["price"] >= 60 for item, _ in index.nearest(query, 50, wide))

    index.remove_rows([str(i) for i in range(2500)])
    assert not index.refresh_vector_index() and index.manifest.vector_index is None  # small again: exact again
    assert [item.id for item, _ in index.nearest(index.vector("2600"), 1)] == ["2600"]


def test_a_build_above_the_threshold_reports_recall(run, squares, capsys):
    report = build_index(run, ListSource(squares(400)), exact_below=300, progress=True)
    assert report.partitions == 16 and report.recall is not None and report.recall > 0.9
    assert "recall@10" in capsys.readouterr().out
    assert not Index.open(report.folder, run).searches_exactly()


def test_many_small_upserts_leave_few_files(run, squares):
    build(run, squares(3))
    index = Index.open(run.folder / "index", run)
    for i in range(4, 40):
        index.upsert(squares(i, i - 1))
    assert index._table.stats()["fragment_stats"]["num_fragments"] <= 21 and len(index) == 39
    index.optimise()
    assert index._table.stats()["fragment_stats"]["num_fragments"] <= 2 and len(index) == 39
    assert search(index, run, text="number38", mode="text")[0].id == "item 38"


def test_odd_column_names_and_changed_types(run, squares):
    source = ListSource(squares(6))
    source.columns = {
        "Width (cm)": "number",
        "width cm": "number",
        "größe": "text",
        "name": "text",
        "select": "boolean",
    }
    for n, pair in enumerate(source.rows):
        pair.attributes = {"Width (cm)": n / 2, "width cm": -n, "größe": "ü'%", "name": f"n{n}", "select": n > 3}
    build_index(run, source, progress=False)
    index = Index.open(run.folder / "index", run)
    expected = {'"Width (cm)" >= 1': 4, "width cm = -2": 1, "größe = 'ü''%'": 6, "name = n1": 1, "select = yes": 2}
    for text, count in expected.items():
        assert index.count(parse(text, index.filter_columns)) == count, text
    again = ListSource(squares(9))
    again.columns = {"select": "text"}
    for pair in again.rows:
        pair.attributes = {"select": "maybe"}
    build_index(run, again, progress=False)
    index = Index.open(run.folder / "index", run)
    assert index.columns == {"select": "text"}
    assert index.count(parse("select = maybe", index.filter_columns)) == 9  # rows of before, and new ones
    assert new_column("漢字", "text", ["a_"]).field == "a__2"


def test_a_full_disk_is_told_and_earlier_rows_survive(run, squares, tmp_path):
    """On a real, tiny file system of memory; where one may not be mounted, there is nothing to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1500k tmpfs {disk} 2>/dev/null"):
        pytest.skip("needs the right to mount a small file system")
    try:
        assert build(run, squares(50), disk / "index").added == 50
        (disk / "filler").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 30_000))
        with pytest.raises(UserError, match=r"is full.*continues where it stopped"):
            build(run, squares(300), disk / "index")
        assert set(ids(Index.open(disk / "index", run))) >= {p.id for p in squares(50)}
        (disk / "filler").unlink()
        assert build(run, squares(300), disk / "index").rows == 300
    finally:
        os.system(f"umount {disk}")


def test_real_sources_a_table_and_a_tar(run, squares, tmp_path):
    import csv
    import tarfile

    from interlace.data.sources.open import open_source

    pairs = squares(12)
    folder = tmp_path / "table"
    folder.mkdir()
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "caption", "room", "width_cm"])
        for pair in pairs:
            writer.writerow(
                [pair.id, pair.picture.path, pair.caption, pair.attributes["room"], pair.attributes["width_cm"]]
            )
    source = open_source(folder)
    assert build_index(run, source, progress=False).added == 12
    index = Index.open(run.folder / "index", run)
    assert index.columns == {"room": "text", "width_cm": "number"}
    hits = search(index, run, text="red", where="room = Kitchen and width_cm is missing")
    assert [hit.id for hit in hits] == ["item 0"]
    assert build_index(run, open_source(folder), progress=False).unchanged == 12

    shard = tmp_path / "shards" / "0000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for pair in pairs:
            number = pair.id.split()[1].zfill(4)
            tar.add(pair.picture.path, f"{number}.png")
            (text := tmp_path / "caption.txt").write_text(pair.caption)
            tar.add(text, f"{number}.txt")
    source = open_source(shard.parent)
    other = tmp_path / "tar_index"
    assert build_index(run, source, other, progress=False).added == 12
    hit = search(Index.open(other, run), run, text="purple", k=1)[0]
    assert hit.picture.offset and hit.picture.path == str(shard)
    assert Image.open(BytesIO(hit.picture.read())).format == "PNG"
