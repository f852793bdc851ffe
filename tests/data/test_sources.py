"""Every format round trip with real files, and what is said about files that are not right."""

import json
import pickle
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import drawing, encoded, make_pictures, same

from interlace.data.rows import SPLITS
from interlace.data.sources import build, open_source
from interlace.data.sources.webdataset import braces
from interlace.errors import UserError

WORDS = ["a red chair", "two blue lamps", "an old table", "green sofa", "tall glass door", "wooden bed"]


def write_csv(file, header, rows, separator=","):
    file.write_text("\n".join(separator.join(map(str, row)) for row in [header, *rows]) + "\n", encoding="utf-8")
    return file


def check_six(source, attributes=True):
    """The six pictures with their captions, whatever the format they came in."""
    assert len(source) == 6
    assert source.n_problems == 0
    for i, pair in enumerate(source.pairs()):
        assert pair.caption == WORDS[i]
        assert same(pair.picture, i)
        assert pair.split in SPLITS
        assert pair.name and pair.id
        if attributes:
            assert pair.attributes["price"] == 10.5 + i
            assert pair.attributes["sale"] is (i % 2 == 0)
            assert pair.attributes["colour"] == ("red" if i else None)
    if attributes:
        assert source.columns == {"price": "number", "sale": "boolean", "colour": "text"}
    assert len({pair.id for pair in source.pairs()}) == 6


def facts(i):
    return {"price": 10.5 + i, "sale": i % 2 == 0, "colour": "red" if i else None}


def test_csv_with_attributes(tmp_path):
    names = make_pictures(tmp_path / "img", 6)
    rows = [(f"img/{n}", w, 10.5 + i, "yes" if i % 2 == 0 else "no", "red" if i else "") for i, (n, w) in
            enumerate(zip(names, WORDS))]  # fmt: skip
    file = write_csv(tmp_path / "items.csv", ("image", "caption", "price", "sale", "colour"), rows)
    check_six(open_source(file))
    check_six(open_source(tmp_path))  # the folder's only table


def test_open_clip_tsv_and_column_names(tmp_path):
    names = make_pictures(tmp_path, 6)
    file = write_csv(tmp_path / "train.tsv", ("filepath", "title"), zip(names, WORDS), "\t")
    check_six(open_source(file), attributes=False)
    file = write_csv(tmp_path / "odd.csv", ("where", "what"), zip(names, WORDS), "\t")  # a tab in a .csv
    check_six(open_source(file, columns={"image": "where", "caption": "what"}), attributes=False)


def test_quoted_line_breaks_and_bad_lines(tmp_path):
    make_pictures(tmp_path, 3)
    (tmp_path / "a.csv").write_bytes(
        b'image,caption\n000.png,"one,\ntwo"\n001.png\n002.png,caf\xe9\ngone.png,x\nhttp://host/x.jpg,y\n002.png,ok\n'
    )
    source = open_source(tmp_path / "a.csv")
    assert [pair.caption for pair in source.pairs()] == ["one, two", "ok"]
    reasons = dict(source.problems)
    assert source.n_problems == 4
    assert "1 instead of 2" in reasons[2] and "UTF-8" in reasons[3] and "missing file" in reasons[4]
    assert "web address" in reasons[5]


def numbered(folder, n=47):
    """The lines of a table of n rows: row i is line i + 2."""
    make_pictures(folder, 1)
    return ["image,caption,id", *(f"000.png,a chair with {i} legs,{i}" for i in range(n))]


def test_a_quote_that_nobody_closes_is_found(tmp_path):
    lines = numbered(tmp_path)
    lines[7] = '000.png,"a chair with 6 legs,6'
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    source = open_source(tmp_path / "a.csv")
    ((row, reason),) = source.problems
    assert len(source) == 6 and source.n_problems == 41
    assert row == "line 8" and "opened and not closed: up to line 48, the file's end, 41 lines became one" in reason
    assert source.left_out().startswith("41 of 47 rows left out (a quote is opened and not closed: 41): ")
    lines[7] = '000.png,a chair with 6 legs,"6'  # in the last cell, so that the row has as many as it should
    (tmp_path / "a.csv").write_text("\r\n".join(lines))
    assert open_source(tmp_path / "a.csv").problems == [(row, reason)]


def test_quotes_that_close_in_another_row_are_found(tmp_path):
    lines = numbered(tmp_path)
    for i in (7, 9, 20, 30):
        lines[i] = lines[i].replace(",a", ',"a', 1)
    (tmp_path / "a.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "a.csv")
    assert [row for row, _ in source.problems] == ["line 8", "line 21"] and source.n_problems == 3 + 11
    assert "closed in another row: lines 8 to 10 became one row" in source.problems[0][1]
    assert [pair.id for pair in source.pairs()] == [str(i) for i in range(47) if i not in {6, 7, 8, *range(19, 30)}]
    lines[12] = "gone.png,x,11"
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert (12, "missing file: gone.png") in open_source(tmp_path / "a.csv").problems  # rows keep their numbers


@pytest.mark.parametrize("cells", ['chair {}",red', 'chair, number {}",red', 'chair {}",'])
def test_an_open_quote_among_quoted_cells_takes_one_row_more(tmp_path, cells):
    names = make_pictures(tmp_path, 4)
    lines = [f'{name},"{cells.format(i)}' for i, name in enumerate(names)]
    lines[1] = lines[1].replace('",', ",")
    (tmp_path / "a.csv").write_text("\n".join(["image,caption,colour", *lines]))
    source = open_source(tmp_path / "a.csv")
    assert [pair.id for pair in source.pairs()] == ["000.png", "003.png"]
    assert source.n_problems == 2 and "lines 3 to 4 became one row" in source.problems[0][1]


def test_a_quoted_cell_that_holds_rows_is_kept_with_a_doubt(tmp_path):
    lines = numbered(tmp_path)
    lines[7], lines[9] = '000.png,"a chair', 'with 8 legs",8'
    (tmp_path / "a.csv").write_text("\n".join(lines))
    source = open_source(tmp_path / "a.csv")
    assert source.n_problems == 0 and len(source) == 45
    (doubt,) = source.doubts
    assert doubt.startswith("line 8: a cell of lines 8 to 10 holds lines that look like rows, such as '000.png,a chair")


def test_line_breaks_in_quoted_cells_are_no_doubt(tmp_path):
    make_pictures(tmp_path, 1)
    for header, cells in (("image,caption", '"Oak, grey,\nand wool, or so"'),
                          ("image,caption", '"one ""two"",\r\nthree, four\n"'),
                          ("image,caption,colour,room", '"Oak, grey, red, blue\nold, new, big, small",red,"hall\n"'),
                          ("image,caption", '"Tisch,\n3,5 m breit"'),
                          ("image,caption", '"an oak\n"old" chair"'),  # not well written, and clear all the same
                          ("image\tcaption\tcolour", '"Oak,grey,red\nold,new,big"\tred')):  # fmt: skip
        separator = "\t" if "\t" in header else ","
        (tmp_path / "a.csv").write_text(f"{header}\n000.png{separator}{cells}\n", newline="")
        source = open_source(tmp_path / "a.csv")
        assert len(source) == 1 and source.problems == [] and source.doubts == []
        assert source.left_out() == ""


def test_an_open_quote_in_the_header(tmp_path):
    (tmp_path / "a.csv").write_text('image,"caption\n000.png,x\n')
    with pytest.raises(UserError, match="the header opens a quote and does not close it"):
        open_source(tmp_path / "a.csv")


def test_what_is_left_out_is_told_in_a_sentence(tmp_path):
    make_pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_bytes(b"id,image,caption\nA,000.png,one\nB,gone.png,two\nC,001.png,caf\xe9\nD,x.png,x\n")
    told = "3 of 4 rows left out (missing file: 2, not UTF-8: 1)"
    assert open_source(tmp_path / "a.csv").left_out() == f"{told}: `interlace data check` lists them"
    asked = [{"pair_id": p, "question": "what?", "answers": "x"} for p in "ABZ"]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    told += ", 2 of 3 questions left out (no pair with id: 1, about rows that were left out: 1)"
    assert open_source(tmp_path / "a.csv").left_out() == f"{told}: `interlace data check` lists them"
    twice = open_source([tmp_path / "a.csv", tmp_path / "a.csv"]).left_out()
    assert twice.startswith("6 of 8 rows left out (missing file: 4, not UTF-8: 2), 4 of 6 questions")
    (tmp_path / "q.jsonl").write_text('{"image": "000.png", "question": "what?", "answer": "x"}\n[1]\n')
    assert open_source(tmp_path / "q.jsonl").left_out().startswith("1 of 2 rows left out (not a JSON object: 1)")


def test_a_row_without_its_text_is_not_left_out(tmp_path):
    (name,) = make_pictures(tmp_path, 1)
    (tmp_path / name).with_suffix(".txt").write_bytes(b"caf\xe9")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert source.left_out().startswith("1 of 1 rows incomplete (its text is not readable: 1): ")


@pytest.mark.parametrize(("line", "said"), [
    ('{"pair_id": "000.png", "question": "what?", "answers": [["lamp", 1e9]]}', "from 0 to 1, got 1000000000"),
    ('{"pair_id": "000.png", "question": "what?", "answers": [["lamp", 3], ["no", 1]]}', "repeat the word in a list"),
    ('{"pair_id": "000.png", "question": "what?", "answers": {"lamp": -1}}', "from 0 to 1, got -1"),
    ('{"pair_id": "000.png", "question": "what?", "answers": [["lamp", NaN]]}', "from 0 to 1, got NaN"),
    ('{"pair_id": "000.png", "question": "what?", "answers": [["lamp", "much"]]}', 'from 0 to 1, got "much"'),
    ('{"pair_id": "000.png", "question": "what?", "answers": [["lamp", 1], ["light"]]}', "expected words, or pairs"),
    ('{"pair_id": "000.png", "answers": ["lamp"]}', "no `question`: expected {"),
    ('{"question": "what?", "answers": ["lamp"]}', "no `pair_id`: expected {"),
    ('["000.png", "what?", "lamp"]', "not an object: expected {.*, got a list"),
    ('{"pair_id": ', "not readable as JSON"),
])  # fmt: skip
def test_a_wrong_question_is_left_out_and_said_in_words(tmp_path, line, said):
    make_pictures(tmp_path, 1)
    (tmp_path / "a.csv").write_text("image,caption\n000.png,one\n")
    good = '{"pair_id": "000.png", "question": "what?", "answers": [["lamp", 1.0], ["light", 0.3]]}'
    (tmp_path / "questions.jsonl").write_text(f"\ufeff{good}\n{line}\n")
    source = open_source(tmp_path / "a.csv")
    assert [q.answers[0] for q in source.questions()] == [("lamp", 1.0)]
    ((place, reason),) = source.problems
    assert place == "questions.jsonl line 2" and re.search(said, reason) and "Error" not in reason


def test_a_wrong_weight_in_a_table_of_questions(tmp_path):
    make_pictures(tmp_path, 1)
    rows = [{"image": "000.png", "question": "what?", "answer": answer} for answer in ("lamp", [["lamp", 7]])]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    source = open_source(tmp_path / "q.json")
    assert source.n_questions == 1 and source.problems[0][0] == 2 and "from 0 to 1, got 7" in source.problems[0][1]


def test_blanks_around_an_attribute_are_not_part_of_it(tmp_path):
    names = make_pictures(tmp_path, 2)
    file = write_csv(tmp_path / "a.csv", ("image", "caption", "colour", "group"),
                     [(names[0], " a  b ", " red", "g "), (names[1], "c", "red\u00a0", "g")])  # fmt: skip
    source = open_source(file)
    assert source.attribute("colour") == ["red", "red"] and source.pair(0).caption == "a b"
    assert source.pair(0).group == source.pair(1).group == "g"


def test_questions_about_rows_left_out_are_counted_not_listed(tmp_path):
    make_pictures(tmp_path, 1)
    (tmp_path / "a.csv").write_text("id,image,caption\nA,000.png,one\nB,gone.png,two\n")
    asked = [{"pair_id": p, "question": "what?", "answers": ["x"]} for p in ("A", "B", "B", "C")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    source = open_source(tmp_path / "a.csv")
    assert source.n_questions == 1 and source.n_lost_questions == 2
    assert source.problems == [(2, "missing file: gone.png"), ("question C?3", "no pair with id: C")]
    assert source._problems.lost_first == ["B?1", "B?2"]
    joined = open_source([tmp_path / "a.csv", tmp_path / "a.csv"])
    assert joined.n_lost_questions == 4 and joined._problems.lost_first[0] == "a1/B?1"


def test_it_is_said_which_column_is_which(tmp_path):
    names = make_pictures(tmp_path, 1)
    file = write_csv(tmp_path / "shop.csv", ("Photo", "title", "description", "sku"), [(names[0], "a", "b", "c")])
    said = open_source(file).describe_columns()
    assert said[0] == "columns: image=Photo, caption=title, id=sku"
    assert "'description' is an attribute" in said[1] and "--column caption=description" in said[1]
    said = open_source(file, columns={"caption": "description"}).describe_columns()
    assert said == ["columns: caption=description, image=Photo, id=sku, name=title"]
    said = open_source([file, file]).describe_columns()
    assert [line.split(":")[0] for line in said] == ["columns of shop1", "columns of shop2", "NOTE", "NOTE"]
    questions = [{"question_id": 1, "photo": names[0], "question": "what?", "answer": "x"}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    said = open_source(tmp_path / "q.json").describe_columns()
    assert said == ["columns: image=photo, question_id=question_id, question=question, answer=answer"]


def test_errors_name_what_the_command_line_has(tmp_path):
    (tmp_path / "a.csv").write_text("Bild,caption\n1.jpg,x\n")
    with pytest.raises(UserError, match="--column image=NAME"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(UserError, match="--pictures FOLDER"):
        open_source(tmp_path / "a.csv", columns={"image": "Bild"})


def test_json_and_jsonl(tmp_path):
    names = make_pictures(tmp_path, 6)
    records = [{"image": n, "caption": w, **facts(i)} for i, (n, w) in enumerate(zip(names, WORDS))]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    check_six(open_source(tmp_path / "a.json"))
    check_six(open_source(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"image": \n[1]\n')
    source = open_source(tmp_path / "b.jsonl")
    assert len(source) == 6 and [row for row, _ in source.problems] == [7, 8]


def test_several_captions_of_a_picture_share_its_group(tmp_path):
    names = make_pictures(tmp_path, 2)
    records = [
        {"image": names[0], "caption": ["a cat", "a grey cat"], "image_id": "x"},
        {"image": names[1], "caption": "dog"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = open_source(tmp_path / "a.json")
    assert [(p.id, p.caption) for p in source.pairs()] == [("x-0", "a cat"), ("x-1", "a grey cat"), ("001.png", "dog")]
    assert source.pair(0).group == source.pair(1).group != source.pair(2).group
    assert source.group_codes[0] == source.group_codes[1] != source.group_codes[2]


def test_coco_and_karpathy_captions(tmp_path):
    names = make_pictures(tmp_path / "images", 2)
    coco = {"images": [{"id": 7, "file_name": names[0]}, {"id": 8, "file_name": names[1]}],
            "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "uno"},
                            {"image_id": 8, "caption": "two"}]}  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    assert [p.caption for p in open_source(tmp_path / "captions.json").pairs()] == ["one", "uno", "two"]
    karpathy = {
        "images": [
            {"filename": names[0], "split": "restval", "imgid": 1, "sentences": [{"raw": "one"}]},
            {"filename": names[1], "split": "test", "imgid": 2, "sentences": [{"raw": "two"}]},
        ]
    }
    (tmp_path / "captions.json").write_text(json.dumps(karpathy))
    assert [(p.caption, p.split) for p in open_source(tmp_path / "captions.json").pairs()] == [
        ("one", "train"),
        ("two", "test"),
    ]


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet(tmp_path, embedded, own_cache):
    names = make_pictures(tmp_path / "images", 6)
    images = [{"bytes": encoded(drawing(i)), "path": None} if embedded else name for i, name in enumerate(names)]
    rows = [{"image": image, "caption": w, **facts(i)} for i, (image, w) in enumerate(zip(images, WORDS))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    for _ in range(2):  # the second time from what was unpacked the first
        check_six(open_source(tmp_path / "a.parquet"))
    unpacked = list((own_cache / "unpacked").glob("*.bin")) if embedded else []
    assert len(unpacked) == embedded


def test_parquet_of_plain_bytes_in_split_shards(tmp_path):
    (tmp_path / "data").mkdir()
    for split, span in (
        ("train-00000-of-00002", (0, 2)),
        ("train-00001-of-00002", (2, 4)),
        ("validation-00000", (4, 6)),
    ):
        rows = [{"image": encoded(drawing(i)), "text": WORDS[i]} for i in range(*span)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}.parquet")
    source = open_source(tmp_path)
    assert [(p.caption, p.split) for p in source.pairs()] == list(zip(WORDS, ["train"] * 4 + ["val"] * 2))
    assert all(same(pair.picture, i) for i, pair in enumerate(source.pairs()))


def test_image_folder_with_metadata(tmp_path):
    make_pictures(tmp_path / "train", 4)
    make_pictures(tmp_path / "test", 2, start=4)
    for split, span in (("train", range(4)), ("test", range(4, 6))):
        lines = [json.dumps({"file_name": f"{i:03d}.png", "text": WORDS[i], **facts(i)}) for i in span]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path)
    check_six_any_order = sorted((p.caption, p.split) for p in source.pairs())
    assert check_six_any_order == sorted(zip(WORDS, ["train"] * 4 + ["test"] * 2))
    assert all(same(pair.picture, WORDS.index(pair.caption)) for pair in source.pairs())
    write_csv(tmp_path / "train" / "metadata.csv", ("file_name", "text"), [("000.png", "only")])
    assert [p.caption for p in open_source(tmp_path / "train").pairs()] == ["only"]


def test_hugging_face_data_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        price=datasets.Value("float64"),
        sale=datasets.Value("bool"),
        colour=datasets.ClassLabel(names=["red", "blue"]),
    )
    rows = [{"image": {"bytes": encoded(drawing(i)), "path": None}, "caption": WORDS[i], **facts(i)} for i in range(6)]
    for row in rows:
        row["colour"] = 0 if row["colour"] else None
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    check_six(open_source(tmp_path / "one"))
    both = datasets.DatasetDict(train=saved.select(range(3)), validation=saved.select([5, 3]))
    both.save_to_disk(tmp_path / "two")
    source = open_source(tmp_path / "two")
    expected = [(WORDS[i], split) for i, split in ((0, "train"), (1, "train"), (2, "train"), (5, "val"), (3, "val"))]
    assert [(p.caption, p.split) for p in source.pairs()] == expected
    assert [same(p.picture, i) for p, i in zip(source.pairs(), (0, 1, 2, 5, 3))] == [True] * 5


def write_shard(file, samples):
    import io

    with tarfile.open(file, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_shards_are_read_by_position(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"{i:05d}.png", encoded(drawing(i))), (f"{i:05d}.txt", WORDS[i].encode()),
                        (f"{i:05d}.json", json.dumps(facts(i)).encode())]  # fmt: skip
        write_shard(tmp_path / f"shard-{shard:04d}.tar", members)
    for source in (str(tmp_path / "shard-{0000..0001}.tar"), tmp_path):
        check_six(open_source(source))
    one = open_source(tmp_path / "shard-0001.tar")
    assert [one.pair(i).id for i in (2, 0)] == ["00005", "00003"]
    assert one.pair(2).picture.offset is not None
    with pytest.raises(UserError, match=r"3 shards expected, .*shard-0002.tar does not exist"):
        open_source(str(tmp_path / "shard-{0000..0002}.tar"))


def test_webdataset_that_the_webdataset_library_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, words in enumerate(WORDS):
            writer.write({"__key__": f"{i:03d}", "png": drawing(i), "txt": words, "json": facts(i)})
    check_six(open_source(tmp_path / "a.tar"))


def test_webdataset_with_wrong_suffix_or_torn_end(tmp_path):
    write_shard(
        tmp_path / "a.tar", [("1.picture", b"x"), ("1.txt", b"one"), ("2.png", encoded(drawing(0))), ("2.txt", b"two")]
    )
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 1 and "it has only picture, txt" in source.problems[0][1]
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: data.rindex(b"2.txt") + 100])
    assert len(open_source(tmp_path / "a.tar")) == 1
    write_shard(tmp_path / "b.tar", [("1.picture", b"x")])
    with pytest.raises(UserError, match="no row of 1 has a readable picture"):
        open_source(tmp_path / "b.tar")


def test_braces():
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]


def test_folder_of_pictures_with_texts_beside_them(tmp_path):
    names = make_pictures(tmp_path, 6)
    for i, name in enumerate(names):
        (tmp_path / name).with_suffix(".txt").write_text(WORDS[i] + "\n")
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(facts(i)))
    check_six(open_source(tmp_path))


def test_folder_of_pictures_without_texts(tmp_path):
    make_pictures(tmp_path / "chairs", 2)
    make_pictures(tmp_path / "lamps", 2, start=2)
    source = open_source(tmp_path)
    assert [p.caption for p in source.pairs()] == [""] * 4
    assert source.attribute("folder") == ["chairs", "chairs", "lamps", "lamps"]
    assert len(set(source.group_codes.tolist())) == 4  # no text in common is no reason to share a group
    assert {p.name for p in source.pairs()} == {"000", "001", "002", "003"}


def test_folder_named_by_split(tmp_path):
    make_pictures(tmp_path / "train" / "x", 2)
    make_pictures(tmp_path / "val" / "x", 1, start=2)
    source = open_source(tmp_path)
    assert [(p.split, p.attributes["folder"]) for p in source.pairs()] == [("train", "x"), ("train", "x"), ("val", "x")]


def test_split_files_of_one_folder(tmp_path):
    make_pictures(tmp_path, 4)
    for split, rows in (("train", ("000.png", "001.png")), ("val", ("002.png",)), ("test", ("003.png",))):
        write_csv(tmp_path / f"{split}.csv", ("image", "caption"), [(row, row) for row in rows])
    source = open_source(tmp_path)
    assert sorted((p.id, p.split) for p in source.pairs()) == [
        ("000.png", "train"), ("001.png", "train"), ("002.png", "val"), ("003.png", "test")]  # fmt: skip
    joined = open_source([tmp_path / "train.csv", tmp_path / "val.csv"])
    assert [p.split for p in joined.pairs()] == ["train", "train", "val"]
    (tmp_path / "other.csv").write_text("image,caption\n000.png,x\n")
    with pytest.raises(UserError, match="holds 4 tables"):
        open_source(tmp_path)


def test_lavis_questions(tmp_path):
    make_pictures(tmp_path, 2)
    rows = [
        {"question_id": 1, "image": "000.png", "question": "what is it?", "answer": ["cat", "cat", "dog", "cat"]},
        {"question_id": 2, "image": "000.png", "question": "is it  big?", "answer": "yes"},
        {"question_id": 3, "image": "001.png", "question": "how many?", "answer": ["2"]},
        {"question_id": 4, "image": "gone.png", "question": "why?", "answer": ["so"]},
    ]
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    source = open_source(tmp_path / "vqa.json")
    assert len(source) == 2 and source.n_questions == 3
    first, second, third = source.questions()
    assert first.answers == [("cat", 0.75), ("dog", 0.25)] and first.id == "1"
    assert second.question == "is it big?" and second.answers == [("yes", 1.0)]
    assert first.pair_id == second.pair_id == "000.png" and same(third.picture, 1)
    assert first.split == source.pair(0).split and third.group == source.pair(1).group
    assert any("gone.png" in reason for _, reason in source.problems)


def test_questions_in_a_csv(tmp_path):
    make_pictures(tmp_path, 1)
    write_csv(
        tmp_path / "q.csv", ("image", "question", "answer"), [("000.png", "what?", "a b"), ("000.png", "who?", "c")]
    )
    assert [(q.question, q.answers) for q in open_source(tmp_path / "q.csv").questions()] == [
        ("what?", [("a b", 1.0)]), ("who?", [("c", 1.0)])]  # fmt: skip


def test_vqa2_soft_scores_and_picture_names(tmp_path):
    (tmp_path / "train2014").mkdir()
    drawing(0).save(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg", "PNG")
    answers = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["grey"]
    question = {"image_id": 9, "question": "What colour?", "question_id": 90}
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({"data_subtype": "train2014", "questions": [question]})
    )
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(
        json.dumps({"annotations": [{"question_id": 90, "image_id": 9, "answer_type": "other",
                                     "answers": [{"answer": answer} for answer in answers]}]})
    )  # fmt: skip
    (asked,) = open_source(tmp_path).questions()
    assert [answer for answer, _ in asked.answers] == ["red", "blue", "green", "grey"]
    assert [weight for _, weight in asked.answers] == pytest.approx([1.0, 0.9, 0.6, 0.3])
    assert (asked.kind, asked.pair_id) == ("other", "9") and same(asked.picture, 0)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "train2014").rename(elsewhere)
    assert open_source(tmp_path, pictures=elsewhere).n_questions == 1


def test_joining_prefixes_ids_and_unites_attributes(tmp_path):
    for name, extra in (("one", "price"), ("two", "colour")):
        make_pictures(tmp_path / name, 2, start=0 if name == "one" else 2)
        first = 0 if name == "one" else 2
        rows = [(1, f"{first:03d}.png", "same words", "g", 5), (2, f"{first + 1:03d}.png", name, "", 6)]
        write_csv(tmp_path / name / "pairs.csv", ("id", "image", "caption", "group", extra), rows)
        (tmp_path / name / "questions.jsonl").write_text(
            json.dumps({"pair_id": 2, "question": name, "answers": [["x", 0.5]]})
        )
    source = open_source([tmp_path / "one", tmp_path / "two"])
    assert [p.id for p in source.pairs()] == ["one/1", "one/2", "two/1", "two/2"]
    assert [p.attributes for p in source.pairs()][2] == {"source": "two", "price": None, "colour": 5.0}
    assert source.pair(0).group != source.pair(2).group  # both "g", but in different sources
    assert [(q.pair_id, q.question) for q in source.questions()] == [("one/2", "one"), ("two/2", "two")]
    assert [same(p.picture, i) for i, p in enumerate(source.pairs())] == [True] * 4


def test_fingerprint_follows_rows_and_pictures(tmp_path):
    make_pictures(tmp_path, 2)
    file = write_csv(tmp_path / "a.csv", ("image", "caption"), [("000.png", "x"), ("001.png", "y")])
    first = open_source(file).fingerprint
    assert open_source(file).fingerprint == first
    write_csv(file, ("image", "caption"), [("000.png", "x"), ("001.png", "z")])
    second = open_source(file).fingerprint
    drawing(9, side=50).save(tmp_path / "001.png")
    assert len({first, second, open_source(file).fingerprint}) == 3


def test_no_group_straddles_a_split_and_shares_are_near_80_10_10(tmp_path):
    make_pictures(tmp_path, 40)
    rows = [(f"{i % 40:03d}.png", f"caption {i % 700}", f"Item {i}") for i in range(2000)]
    source = open_source(write_csv(tmp_path / "a.csv", ("image", "caption", "id"), rows))
    splits_of: dict[str, set[str]] = {}
    for pair in source.pairs():
        splits_of.setdefault(pair.group, set()).add(pair.split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    # equal pictures and equal captions both join: 700 captions over 40 pictures make gcd(40, 700) = 20 groups
    assert len(splits_of) == 20
    rows = [("000.png", f"words {i}", str(i), i // 2) for i in range(4000)]
    source = open_source(write_csv(tmp_path / "b.csv", ("image", "caption", "id", "group"), rows))
    shares = [len(source.indices(split)) / 4000 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    shuffled = open_source(write_csv(tmp_path / "b.csv", ("image", "caption", "id", "group"), rows[::-1]))
    assert {p.id: p.split for p in shuffled.pairs()} == {p.id: p.split for p in source.pairs()}


def test_a_hash_column_joins_near_equal_pictures(tmp_path):
    make_pictures(tmp_path, 3)
    rows = [
        ("000.png", "a", "ff00ff00ff00ff00"),
        ("001.png", "b", "ff00ff00ff00ff01"),
        ("002.png", "c", "00ff00ff00ff00ff"),
    ]
    source = open_source(write_csv(tmp_path / "a.csv", ("image", "caption", "phash"), rows))
    groups = [pair.group for pair in source.pairs()]
    assert groups[0] == groups[1] != groups[2]


def test_large_tables_spill_to_disk_and_travel_by_name(tmp_path, monkeypatch, own_cache):
    monkeypatch.setattr(build, "SPILL", 50)
    monkeypatch.setattr(build, "BATCH", 20)
    make_pictures(tmp_path, 1)
    rows = [("000.png", f"words {i}", i) for i in range(100)]
    source = open_source(write_csv(tmp_path / "a.csv", ("image", "caption", "id"), rows))
    assert len(list((own_cache / "tables").glob("*.arrow"))) == 1
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 20_000
    assert [again.pair(i).caption for i in (0, 99)] == ["words 0", "words 99"]
    assert again.fingerprint == source.fingerprint


def test_article_numbers_stay_text_and_repeated_ids_are_renamed(tmp_path):
    make_pictures(tmp_path, 3)
    rows = [("000.png", "a", 7, "0042"), ("001.png", "b", 7, "0043"), ("002.png", "c", 8, "0044")]
    source = open_source(write_csv(tmp_path / "a.csv", ("image", "caption", "id", "article"), rows))
    assert [p.id for p in source.pairs()] == ["7", "7#2", "8"]
    assert source.attribute("article") == ["0042", "0043", "0044"]


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (("imgae", "caption"), None, r"no column for image.*it has 'imgae', 'caption'.*'image'"),
        (("image", "caption"), {"image": "foto"}, r"a\.csv: no column 'foto' for image; it has 'image', 'caption'"),
        (("image", "caption"), {"caption": "captoin"}, r"no column 'captoin' for caption.*Did you mean 'caption'"),
        (("image", "caption"), {"captoin": "caption"}, r"No role 'captoin'.*Did you mean 'caption'"),
        (("image", "image"), None, "more than once"),
    ],
)
def test_wrong_columns_are_named_with_the_nearest(tmp_path, header, columns, message):
    make_pictures(tmp_path, 1)
    file = write_csv(tmp_path / "a.csv", header, [("000.png", "x")])
    with pytest.raises(UserError, match=message):
        open_source(file, columns=columns)


def test_what_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'furniture'"):
        open_source("furnitur")
    with pytest.raises(UserError, match="interlace data get furniture"):
        open_source("furniture")
    with pytest.raises(UserError, match="no pictures in this folder"):
        open_source(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        open_source(tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="is empty"):
        open_source(tmp_path / "header.csv")
    (tmp_path / "gone.csv").write_text("image,caption\nx.jpg,a\ny.jpg,b\n")
    with pytest.raises(UserError, match=r"no row of 2 has a readable picture.*missing file \(2\).*x.jpg"):
        open_source(tmp_path / "gone.csv")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"expected \.csv"):
        open_source(tmp_path / "a.xlsx")
    (tmp_path / "a.json").write_text('{"image": 1}\n{"image": 2}')
    with pytest.raises(UserError, match="JSONL"):
        open_source(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(UserError, match="not readable as Parquet"):
        open_source(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="Did you mean 'train'"):
        open_source(tmp_path, split="trian")


def test_why_no_row_is_left_is_told_with_its_remedy(tmp_path):
    names = make_pictures(tmp_path / "p", 4)

    def said(rows, header=("image", "caption", "fold")):
        with pytest.raises(UserError) as error:
            open_source(write_csv(tmp_path / "a.csv", header, rows))
        return str(error.value)

    message = said([(f"p/{name}", "x", i) for i, name in enumerate(names)])
    assert "no row of 4 can be used. Reasons: unknown split (4)" in message and "row 1: unknown split: '0'" in message
    assert "column 'fold' was taken for the splits" in message and "train, training" in message
    assert "rename it in the table" in message and "--pictures" not in message
    message = said([(f"https://host/{name}", "x", "") for name in names])
    assert "never opened: download the pictures" in message and "--pictures" not in message
    message = said([(f"p\\{name}", "x", "") for name in names])
    assert r"backslashes in a path: p\000.png (write p/000.png)" in message and "--pictures" not in message
    message = said([(f"q\\{name}", "x", "") for name in names])
    assert r"missing file: q\000.png" in message and "--pictures FOLDER" in message
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 500)
    with pytest.raises(UserError, match=r"broken.tar: no row of 1 can be used.*cut off or is not a tar: ") as error:
        open_source(tmp_path / "broken.tar")
    assert "--pictures" not in str(error.value)


def test_unknown_split_words_are_listed(tmp_path):
    make_pictures(tmp_path, 2)
    file = write_csv(
        tmp_path / "a.csv", ("image", "caption", "split"), [("000.png", "a", "validation"), ("001.png", "b", "x")]
    )
    source = open_source(file)
    assert [p.split for p in source.pairs()] == ["val"]
    assert "unknown split" in source.problems[0][1]
    assert [p.split for p in open_source(file, split="test").pairs()] == ["test"]
