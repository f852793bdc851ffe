"""The doctor finds each illness, and finds none in healthy data."""

import json

import pytest
from makers import drawing, encoded, make_pictures
from PIL import Image

from interlace.data.check import check
from interlace.data.show import show
from interlace.data.sources import open_source
from interlace.errors import UserError


class Words:
    """A tokenizer of one token per word between two special ones."""

    def __call__(self, texts, **options):
        return {"input_ids": [[1, *(len(word) for word in text.split()), 2] for text in texts]}

    def decode(self, ids):
        return " ".join(map(str, ids))


def write(folder, rows, header="image,caption,split,colour,sale"):
    (folder / "pairs.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return folder


def healthy(folder, n=20):
    names = make_pictures(folder, n)
    splits = ["train"] * (n - 4) + ["val", "val", "test", "test"]
    return [[name, f"caption {i}", splits[i], "red" if i % 3 else "blue", "yes"] for i, name in enumerate(names)]


def levels(report):
    return {finding.what: finding.level for finding in report.findings}


def found(report, what):
    (finding,) = [finding for finding in report.findings if finding.what == what]
    return finding


def test_healthy_data_has_nothing_to_report(tmp_path, capsys):
    report = check(write(tmp_path, healthy(tmp_path)), tokenizer=Words(), max_length=10)
    assert report.exit_status == 0
    assert "error" not in levels(report).values() and "warning" not in levels(report).values()
    assert report.splits == {"train": 16, "val": 2, "test": 2}
    assert ("colour", "text", "2 values, 'red' 65%") in report.attributes
    assert "errors: none" in capsys.readouterr().out


def test_unreadable_pictures_and_rows_left_out(tmp_path):
    rows = healthy(tmp_path)
    whole = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), "JPEG")
    (tmp_path / "000.png").write_bytes(whole[:3000])
    (tmp_path / "001.png").write_bytes(b"")
    (tmp_path / "002.png").write_text("<html>")
    rows.append(["gone.png", "x", "train", "", ""])
    report = check(write(tmp_path, rows))
    assert report.exit_status == 1
    assert found(report, "unreadable pictures").count == 3 and found(report, "rows left out").count == 1
    reasons = dict(report.unreadable)
    assert reasons["000.png"] == "truncated" and reasons["001.png"] == "empty file"
    assert reasons["002.png"] == "not a picture (HTML)"


def test_check_and_show_name_the_columns_and_the_questions_left_out(tmp_path, capsys):
    rows = [[*row, f"long words {i}"] for i, row in enumerate(healthy(tmp_path))]
    rows[3][0] = "gone.png"
    folder = write(tmp_path, rows, header="image,title,split,colour,sale,description")
    (folder / "questions.jsonl").write_text(
        "\n".join(json.dumps({"pair_id": "gone.png", "question": q, "answers": ["x"]}) for q in "abcdefg")
    )
    report = check(folder)
    lost = found(report, "questions left out")
    assert (lost.level, lost.count, lost.examples[0]) == ("warning", 7, "gone.png?0")
    assert found(report, "rows left out").count == 1
    show(folder, rows=1)
    for text in capsys.readouterr().out.split("Source(", 1):
        assert "columns: image=image, caption=title, split=split\n" in text
        assert "NOTE: the captions" in text and "--column caption=description" in text
    with_caption = [row[:5] for row in rows]
    assert len(check(write(tmp_path, with_caption)).columns) == 1  # nothing to choose, no note


def test_duplicates_within_and_across_splits(tmp_path):
    rows = healthy(tmp_path)
    (tmp_path / "001.png").write_bytes((tmp_path / "000.png").read_bytes())  # within train
    report = check(write(tmp_path, rows))
    assert report.exit_status == 0 and found(report, "exact duplicates").count == 2
    (tmp_path / "019.png").write_bytes((tmp_path / "000.png").read_bytes())  # into test
    report = check(tmp_path)
    leak = found(report, "the same picture in two splits")
    assert report.exit_status == 1 and leak.level == "error" and leak.count == 1
    assert leak.examples == ["000.png (train) = 019.png (test)"] and "`--write-groups FILE` lists them" in leak.detail
    drawing(5).save(tmp_path / "copy.jpg", quality=90)
    rows[-1][0] = "copy.jpg"
    report = check(write(tmp_path, rows))
    assert found(report, "near-identical pictures in two splits").examples == ["005.png (train) = copy.jpg (test)"]
    assert report.exit_status == 1 and "the same picture in two splits" not in levels(report)


def test_groups_written_by_the_check_mend_the_leak(tmp_path):
    names = make_pictures(tmp_path, 60)
    for i in range(30):  # each picture twice, with other words
        (tmp_path / names[30 + i]).write_bytes((tmp_path / names[i]).read_bytes())
    rows = [[name, f"words {i}", i] for i, name in enumerate(names)]
    report = check(write(tmp_path, rows, "image,caption,id"), write_groups=tmp_path / "groups.txt")
    assert report.exit_status == 1
    groups = dict(line.split(",") for line in (tmp_path / "groups.txt").read_text().splitlines())
    rows = [[*row, groups[str(row[2])]] for row in rows]
    (tmp_path / "groups.txt").unlink()
    assert check(write(tmp_path, rows, "image,caption,id,group")).exit_status == 0


def test_captions(tmp_path):
    rows = healthy(tmp_path)
    rows[0][1] = ""
    rows[1][1] = "one two three four five six seven eight nine ten"
    report = check(write(tmp_path, rows), tokenizer=Words(), max_length=11)
    assert found(report, "empty captions").count == 1
    cut = found(report, "captions cut")
    assert cut.count == 1 and "longest has 12" in cut.detail and cut.examples == ["001.png: 12 tokens"]
    assert report.exit_status == 0
    make_pictures(tmp_path / "bare", 3)
    assert found(check(tmp_path / "bare"), "no captions").count == 3


def test_questions_and_answers(tmp_path):
    write(tmp_path, healthy(tmp_path))
    asked = [(0, "red"), (1, "red"), (2, "blue"), (19, "green"), (3, None)]
    lines = [
        json.dumps({"pair_id": f"{i:03d}.png", "question": "colour?", "answers": answer, "kind": "colour"})
        for i, answer in asked
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    report = check(tmp_path)
    assert report.questions == [("colour", 4, 3, "red", 0.5)]
    unknown = found(report, "answers never seen in train")
    assert unknown.count == 1 and unknown.examples == ["green"]
    assert found(report, "questions without an answer").count == 1


def test_wrong_questions_are_an_error_and_ids_that_match_nothing_are_explained(tmp_path):
    write(tmp_path, healthy(tmp_path))
    asked = {"question": "colour?", "answers": ["red"]}
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"pair_id": i, **asked}) for i in range(3)))
    wrong = found(check(tmp_path), "wrong questions")
    assert (wrong.level, wrong.count) == ("error", 3) and "'0', a row's id such as '000.png'" in wrong.detail
    (tmp_path / "questions.jsonl").write_text(json.dumps({"pair_id": "000.png", **asked}) + "\n[]\n")
    report = check(tmp_path)
    wrong = found(report, "wrong questions")
    assert wrong.count == 1 and wrong.detail == "they will not be used" and "rows left out" not in levels(report)
    assert report.exit_status == 1


@pytest.mark.parametrize(("caption", "group", "why"), [
    ("a photo", "", "they have the same text, 'a photo'"),
    ("number {}", "chairs", "their `group` is 'chairs'"),
    ("", "chairs", "their `group` is 'chairs'"),
])  # fmt: skip
def test_training_rows_of_one_group_are_an_error(tmp_path, caption, group, why):
    rows = [[*row[:3], group] for row in healthy(tmp_path)]
    for i, row in enumerate(rows):
        row[1] = caption.format(i)
    one = found(check(write(tmp_path, rows, "image,caption,split,group")), "one group")
    assert (one.level, one.count) == ("error", 16)
    assert one.detail.startswith(f"all 16 train rows are one group, so nothing can be told apart: {why}")
    hashed = [[*row[:2], row[3]] for row in rows]  # all rows fall into one split, whichever it is
    one = found(check(write(tmp_path, hashed, "image,caption,group")), "one group")
    assert one.count == 20
    rows[0][3] = "another"
    assert "one group" not in levels(check(write(tmp_path, rows, "image,caption,split,group")))


def test_an_open_quote_is_an_error_and_a_cell_of_rows_a_warning(tmp_path, capsys):
    rows = [[*row[:2], row[2]] for row in healthy(tmp_path)]
    write(tmp_path, rows, "image,caption,split")
    whole = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(whole.replace("caption 6", '"caption 6'))
    report = check(tmp_path)
    left = found(report, "rows left out")
    assert report.exit_status == 1 and left.count == 14 and left.examples[0].startswith("line 8: a quote is opened")
    lines = whole.splitlines()
    lines[7], lines[9] = '006.png,"caption', 'and more",train'
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    report = check(tmp_path)
    assert found(report, "rows to look at").level == "warning" and report.exit_status == 0
    show(tmp_path, rows=1)
    assert "kept, but look at line 8: a cell of lines 8 to 10" in capsys.readouterr().out


def test_numbers_that_make_no_sense(tmp_path):
    write(tmp_path, healthy(tmp_path))
    for n in (0, -3):
        with pytest.raises(UserError, match=f"max_length: expected at least 1 token, got {n}"):
            check(tmp_path, tokenizer=Words(), max_length=n)
        with pytest.raises(UserError, match=f"rows: expected at least 1 to show, got {n}"):
            show(tmp_path, tokenizer=Words(), rows=n)


def test_a_missing_column_is_an_error(tmp_path):
    make_pictures(tmp_path, 1)
    with pytest.raises(UserError, match="no column for image"):
        check(write(tmp_path, [["000.png", "x"]], "photograph_of,caption"))


def test_show_prints_rows_and_what_the_model_sees(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    source = open_source(write(tmp_path, healthy(tmp_path)))
    show(source, rows=2, tokenizer=Words())
    out = capsys.readouterr().out
    assert "caption 0" in out and "caption 1" in out and "caption 2" not in out and "48 x 48" in out
    assert "1 7 1 2  (4 tokens)" in out

    class Processor:
        tokenizer = Words()

        def pictures(self, pictures):
            return torch.zeros(len(pictures), 3, 8, 8, dtype=torch.uint8)

        def texts(self, texts):
            ids = torch.tensor(Words()(texts)["input_ids"])
            return ids, torch.ones_like(ids)

    (tmp_path / "000.png").write_bytes(b"")
    show(source, rows=3, processor=Processor())
    out = capsys.readouterr().out
    assert "not readable: empty file" in out and "(2, 3, 8, 8)" in out and "caption_ids torch.int64 (3, 4)" in out
