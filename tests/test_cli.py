"""The command line as a person meets it: what it takes from a run, what it prints, how it ends."""

from __future__ import annotations

import csv
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import yaml

from interlace.cli import main, parse
from interlace.errors import UserError
from interlace.held import sample_rows
from interlace.run import Run
from interlace.search import Index
from interlace.settings import load_settings


def test_keys_may_stand_after_a_flag_and_two_have_flags_of_their_own(capsys):
    args = parse(["doctor", "demo", "train.lr=1e-3", "--seconds", "5", "data.source=a=b", "--batch", "4096"])
    assert (args.config, args.seconds) == ("demo", 5)
    assert args.overrides == ["train.lr=1e-3", "data.source=a=b", "train.batch=4096"]
    args = parse(["train", "--batch", "4096", "--memory", "8GB", "demo"])
    assert args.config == "demo" and args.overrides == ["train.batch=4096", "train.memory=8GB"]
    settings = load_settings(args.config, args.overrides)
    assert settings.train.batch == 4096 and settings.train.memory == "8GB"
    for wrong in (["train", "demo", "--bacth=3"], ["doctor", "demo", "--seconds", "5", "c"],
                  ["data", "get", "--x=1", "a"]):  # fmt: skip
        with pytest.raises(SystemExit):
            parse(wrong)
        assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.fixture
def odd(shapes, run_folder, tmp_path) -> tuple[Path, Path]:
    """(a run, a table): the run was trained with columns named otherwise, the table lies far from its pictures."""
    run, table = tmp_path / "run", tmp_path / "odd.csv"
    shutil.copytree(run_folder, run)
    with open(shapes / "pairs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    with open(table, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["nr", "Foto", "Blurb", "caption", "split"])
        out.writerows([row["id"], Path(row["image"]).name, row["caption"], "wrong", row["split"]] for row in rows)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"source": str(table), "columns": {"image": "Foto", "caption": "Blurb", "id": "nr"},
                       "pictures": str(shapes / "pictures")}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return run, table


def test_a_run_remembers_the_columns_and_the_pictures(odd, capsys):
    run, table = odd
    assert main(["index", str(run), str(table)]) == 0
    said = capsys.readouterr().out
    assert f"as in {run}/config.yaml: --column image=Foto --column caption=Blurb --column id=nr --pictures " in said
    index = Index.open(run / "index", Run.load(run))
    assert len(index) == 24 and index.get("red-circle-0").caption == "a red circle"
    assert main(["data", "show", str(table), "--run", str(run), "--rows", "1"]) == 0
    assert "columns: image=Foto, caption=Blurb, id=nr" in capsys.readouterr().out


def test_columns_given_win_over_the_runs(odd, shapes, capsys):
    run, table = odd
    given = ["--column", "image=Foto", "--column", "id=nr", "--pictures", str(shapes / "pictures")]
    assert main(["evaluate", str(run), str(table), *given, "--out", str(run / "test.json")]) == 0
    assert "as in" not in capsys.readouterr().out
    assert main(["index", str(run), str(table), *given]) == 0
    assert Index.open(run / "index", Run.load(run)).get("red-circle-0").caption == "wrong"


def test_a_table_without_the_runs_columns_is_told_where_they_come_from(odd, shapes, capsys):
    assert main(["index", str(odd[0]), str(shapes)]) == 2
    assert "The names are the run's; say --column OURS=THEIRS" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    ("data show shapes --rows 0", "argument --rows: expected a whole number from 1 up, got '0'"),
    ("data show shapes --rows -1", "argument --rows: expected a whole number from 1 up, got '-1'"),
    ("data check shapes --max-length 0", "argument --max-length: expected a whole number from 3 up, got '0'"),
    ("data corrupt shapes out --seed -1", "argument --seed: expected a whole number from 0 up, got '-1'"),
    ("doctor demo --seconds -1", "argument --seconds: expected a number of seconds from 0 up, got '-1'"),
    ("doctor demo --seconds nan", "argument --seconds: expected a number of seconds from 0 up, got 'nan'"),
    ("evaluate run shapes --limit 0", "argument --limit: expected a whole number from 1 up, got '0'"),
    ("evaluate run shapes --limit -5", "argument --limit: expected a whole number from 1 up, got '-5'"),
    ("binding run shapes --limit few", "argument --limit: expected a whole number from 1 up, got 'few'"),
    ("answer run a.png what -k 0", "argument -k: expected a whole number from 1 up, got '0'"),
    ("answer run a.png what -k -1", "argument -k: expected a whole number from 1 up, got '-1'"),
    ("search run red -k 0", "argument -k: expected a whole number from 1 up, got '0'"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_with_what_was_expected(line, said, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


@pytest.mark.parametrize("given", ["x", "", "1.5", "-1", "0,,1"])
def test_seeds_are_whole_numbers(given, capsys):
    assert main(["compare", "demo", f"--seeds={given}"]) == 2
    assert f"--seeds: expected whole numbers from 0 up, such as 0,1,2; got {given!r}." in capsys.readouterr().err


@pytest.mark.parametrize("command, flag", [("evaluate run", "--out"), ("binding run", "--out"),
                                           ("data check", "--write-groups")])  # fmt: skip
def test_a_result_that_cannot_be_written_is_said_before_the_work(command, flag, shapes, tmp_path, capsys):
    """The run does not exist: to load it would be another error."""
    start = [*command.split(), str(shapes), flag]
    assert main([*start, str(tmp_path / "nosuch" / "x.json")]) == 2
    assert f"there is no folder {tmp_path / 'nosuch'}. Make it first" in capsys.readouterr().err
    assert main([*start, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path} is a folder: name a file" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [0, -5])
def test_a_python_caller_s_limit_has_the_same_range(limit):
    with pytest.raises(UserError, match=f"limit, the rows at the most, is at least 1; got {limit}"):
        sample_rows(np.arange(3), limit)


def test_a_run_whose_config_is_no_text_is_named(odd, capsys):
    run, table = odd
    (run / "config.yaml").write_bytes("data: {source: größe}".encode("latin-1"))
    assert main(["index", str(run), str(table)]) == 2
    assert "config.yaml is not UTF-8 text" in capsys.readouterr().err


def test_pictures_elsewhere(odd, shapes, capsys):
    columns = ["--column", "image=Foto", "--column", "id=nr"]
    assert main(["data", "check", str(odd[1]), *columns]) == 2
    assert "--pictures FOLDER" in capsys.readouterr().err
    assert main(["data", "check", str(odd[1]), *columns, "--pictures", str(shapes / "pictures")]) in (0, 1)
    assert "24 rows" in capsys.readouterr().out


def test_the_demo_refuses_an_address_before_it_loads_anything(tmp_path, capsys):
    nothing = str(tmp_path / "no-run")  # loading it would be another error
    assert main(["demo", nothing, "--host", "0.0.0.0"]) == 2
    assert "needs a token" in capsys.readouterr().err
    assert main(["demo", nothing, "--port", "70000"]) == 2
    assert "1 to 65535" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", nothing, "--port", str(taken.getsockname()[1])]) == 2
    assert "in use by another program" in capsys.readouterr().err
    assert main(["demo", nothing, "--port", "0"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_rebuild_starts_the_index_over(run_folder, shapes, tmp_path, capsys):
    where = ["--index", str(tmp_path / "index")]
    assert main(["index", str(run_folder), str(shapes), *where]) == 0
    (tmp_path / "index" / "index.json").write_text("{")
    assert main(["index", str(run_folder), str(shapes), *where]) == 2
    assert "--rebuild" in capsys.readouterr().err
    assert main(["index", str(run_folder), str(shapes), *where, "--rebuild"]) == 0
    assert len(Index.open(tmp_path / "index", Run.load(run_folder))) == 192
