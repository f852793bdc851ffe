"""Features made elsewhere: .npz folders, LXMERT's TSV, UNITER's LMDB; pickles are refused."""

import base64
import io
import json
import pickle

import numpy as np
import pytest

from interlace.data.rows import Pair, Picture
from interlace.data.sources import open_source
from interlace.errors import UserError
from interlace.regions import BadRegions, RegionArrays, open_regions
from interlace.regions.lmdb_file import decode
from interlace.regions.tsv import RegionTSV
from tests.regions.makers import full_regions, some_regions

W, H = 640, 480


def row(path: str, id: str = "row") -> Pair:
    return Pair(id, Picture(path), "", "", "train", {}, "")


def write_npz(folder, names, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        np.savez(folder / f"{name}.npz", **some_regions(seed=n).given(), **more)
    return folder


def tsv_line(name: str, regions: RegionArrays) -> str:
    """As LXMERT's extraction script writes it: boxes in pixels."""

    def coded(x, kind):
        return base64.b64encode(np.ascontiguousarray(x, kind).tobytes()).decode()

    boxes = regions.boxes * np.array([W, H, W, H], np.float32)
    cells = [name, H, W, coded(regions.objects, "<i8"), coded(regions.objects_confidence, "<f4"),
             coded(regions.attributes, "<i8"), coded(regions.attributes_confidence, "<f4"), len(regions),
             coded(boxes, "<f4"), coded(regions.features, "<f4")]  # fmt: skip
    return "\t".join(map(str, cells)) + "\n"


def same(ours: RegionArrays, theirs: RegionArrays, names=("features", "boxes", "objects", "attributes")):
    for name in names:
        assert np.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6), name


# ----------------------------------------------------------------------------------------------------------------- npz


def test_a_folder_of_npz(tmp_path):
    regions = open_regions(write_npz(tmp_path / "npz", ["a", "sub/b"][:1]))
    (tmp_path / "npz/sub").mkdir()
    np.savez(tmp_path / "npz/sub/b.npz", **some_regions(seed=1).given())
    assert len(regions) == 2 and sorted(regions.keys()) == ["a", "sub/b"]
    same(regions.get("sub/b"), some_regions(seed=1), ("features", "boxes"))
    assert "a" in regions and "c" not in regions and "../npz/a" not in regions
    same(regions.of(row("/photos/a.jpg")), some_regions(seed=0), ("features", "boxes"))  # by the file's name
    same(regions.of(row("/photos/x.jpg", "sub/b")), some_regions(seed=1), ("features", "boxes"))  # by the row's id
    assert len(open_regions(tmp_path / "npz", regions=2).get("a")) == 2
    with pytest.raises(BadRegions, match="no features of c"):
        regions.get("c")
    with pytest.raises(BadRegions, match="no features in"):
        regions.of(row("/photos/c.jpg", "c"))


def test_the_names_uniter_gives_its_arrays(tmp_path):
    r = full_regions()
    six = np.concatenate([r.boxes, r.boxes[:, 2:] - r.boxes[:, :2]], 1)
    np.savez(tmp_path / "coco_val2014_000000000042.npz", norm_bb=six.astype(np.float16), conf=r.confidence,
             features=r.features.astype(np.float16), soft_labels=r.beliefs)  # fmt: skip
    regions = open_regions(tmp_path)
    got = regions.of(row("/coco/val2014/COCO_val2014_000000000042.jpg"))
    assert np.allclose(got.features, r.features, atol=2e-3) and np.allclose(got.boxes, r.boxes, atol=1e-3)
    assert np.allclose(got.beliefs, r.beliefs) and regions.beliefs_size == 5


def test_boxes_in_pixels_need_the_pictures_size(tmp_path):
    r = some_regions()
    pixels = r.boxes * np.array([W, H, W, H])
    np.savez(tmp_path / "a.npz", x=r.features, bbox=pixels, image_w=W, image_h=H)
    same(open_regions(tmp_path).get("a"), r, ("features", "boxes"))
    np.savez(tmp_path / "b.npz", x=r.features, bbox=pixels)
    with pytest.raises(BadRegions, match=r"outside the picture.*width and height"):
        open_regions(tmp_path).get("b")


def test_a_bad_file_is_refused_by_itself(tmp_path):
    regions = open_regions(write_npz(tmp_path, ["good"]))
    np.savez(tmp_path / "wide.npz", **some_regions(features=9).given())
    np.savez(tmp_path / "objects.npz", features=np.array([{}, {}], object), boxes=np.zeros((2, 4)))
    np.savez(tmp_path / "bare.npz", features=np.zeros((2, 8)))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("<html>")
    np.save(tmp_path / "one", np.zeros((2, 8)))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    reasons = {"wide": "9 features per region, expected 8", "objects": "pickled objects, which are not read",
               "bare": "expected the arrays features and boxes, got features", "cut": "cannot be read",
               "text": "cannot be read", "one": "not an .npz file"}  # fmt: skip
    for key, reason in reasons.items():
        with pytest.raises(BadRegions, match=reason):
            regions.get(key)
    assert len(regions.get("good")) == 3


def test_the_extractor_is_what_is_said_beside_them(tmp_path):
    here, there = write_npz(tmp_path / "here", ["a"]), write_npz(tmp_path / "there", ["b"])
    plain = open_regions(here).fingerprint
    assert open_regions(there).fingerprint == plain  # of the same widths: more is not known
    for folder, name in ((here, "R101"), (there, "X152")):
        (folder / "extractor.json").write_text(json.dumps({"detector": name}))
    assert len({plain, open_regions(here).fingerprint, open_regions(there).fingerprint}) == 3
    with pytest.raises(UserError, match="another extractor than the run was trained with"):
        open_regions(there).require(open_regions(here).fingerprint)
    (here / "extractor.json").write_text("R101")
    with pytest.raises(UserError, match="not JSON"):
        open_regions(here)


def test_rows_without_regions_are_listed(tmp_path, photographs):
    source = open_source(photographs)
    regions = open_regions(write_npz(tmp_path / "npz", ["p0", "row3"]))
    assert regions.missing(source) == ["row1", "row2", "row4"]
    assert regions.missing(source, np.array([0, 1])) == ["row1"]


# ----------------------------------------------------------------------------------------------------------------- tsv


@pytest.fixture
def tsv(tmp_path):
    file = tmp_path / "val_obj36.tsv"
    file.write_text("".join(tsv_line(f"COCO_val2014_{n:012d}", full_regions(n + 1, seed=n)) for n in range(5)))
    return file


def test_the_tsv_of_lxmert(tsv):
    regions = open_regions(tsv)
    assert len(regions) == 5 and regions.features_size == 8
    assert list(regions.keys())[4] == "COCO_val2014_000000000004"
    for n in (3, 0, 4):
        got = regions.of(row(f"/coco/COCO_val2014_{n:012d}.jpg"))
        same(got, full_regions(n + 1, seed=n))
        assert got.objects_confidence.tolist() == [0.5] * (n + 1)
    assert "COCO_val2014_000000000005" not in regions
    assert len(open_regions(tsv, regions=2).get("COCO_val2014_000000000004")) == 2


def test_the_tsv_is_passed_over_once(tsv, monkeypatch):
    open_regions(tsv).get("COCO_val2014_000000000001")
    monkeypatch.setattr(RegionTSV, "_pass", lambda *_: pytest.fail("again"))
    regions = pickle.loads(pickle.dumps(open_regions(tsv)))  # as a loader's worker gets it
    same(regions.get("COCO_val2014_000000000002"), full_regions(3, seed=2))


def test_a_changed_tsv_is_passed_over_again(tsv):
    open_regions(tsv).get("COCO_val2014_000000000001")
    tsv.write_text(tsv_line("new", full_regions(9)) + tsv.read_text())
    regions = open_regions(tsv)
    assert len(regions) == 6 and len(regions.get("new")) == 9
    same(regions.get("COCO_val2014_000000000002"), full_regions(3, seed=2))


def test_a_tsv_of_another_kind(tmp_path, tsv):
    (tmp_path / "captions.tsv").write_text("image\tcaption\n")
    with pytest.raises(UserError, match=r"expected 10 columns.*got 2"):
        open_regions(tmp_path / "captions.tsv")
    tsv.write_text(tsv.read_text() + tsv_line("last", full_regions(3))[:60])
    regions = open_regions(tsv)
    with pytest.raises(BadRegions, match="truncated"):
        regions.get("last")
    cells = tsv_line("odd", full_regions(3)).split("\t")
    tsv.write_text(tsv.read_text() + "\n" + "\t".join([*cells[:8], cells[8][:-8], cells[9]]))
    with pytest.raises(BadRegions, match="cannot be read"):
        open_regions(tsv).get("odd")


# ---------------------------------------------------------------------------------------------------------------- lmdb


def plain(x: np.ndarray) -> dict:
    """As msgpack-numpy packs an array."""
    return {b"nd": True, b"type": x.dtype.str, b"kind": b"", b"shape": x.shape, b"data": x.tobytes()}


def uniter(regions: RegionArrays) -> dict[str, np.ndarray]:
    return {"features": regions.features, "norm_bb": regions.boxes, "conf": regions.confidence,
            "soft_labels": regions.beliefs}  # fmt: skip


def as_npz(regions: RegionArrays) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **uniter(regions))
    return out.getvalue()


def as_msgpack(regions: RegionArrays) -> bytes:
    msgpack = pytest.importorskip("msgpack")
    return msgpack.packb({name: plain(value) for name, value in uniter(regions).items()}, use_bin_type=True)


def as_old_msgpack(regions: RegionArrays) -> bytes:
    """As written without use_bin_type on Python 2: names are bytes."""
    msgpack = pytest.importorskip("msgpack")
    return msgpack.packb({name.encode(): plain(value) for name, value in uniter(regions).items()}, use_bin_type=True)


def as_lz4(regions: RegionArrays) -> bytes:
    return pytest.importorskip("lz4.frame").compress(as_msgpack(regions))


def write_lmdb(folder, values: dict[str, bytes]):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=1 << 22) as env, env.begin(write=True) as write:
        for name, value in values.items():
            write.put(name.encode(), value)
    return folder


@pytest.mark.parametrize("coded", [as_npz, as_msgpack, as_old_msgpack, as_lz4])
def test_the_lmdb_of_uniter(tmp_path, coded):
    values = {f"coco_val2014_{n:012d}.npz": coded(full_regions(n + 1, seed=n)) for n in range(3)}
    values["__keys__"] = json.dumps(list(values)).encode()
    folder = write_lmdb(tmp_path / "feat_th0.2_max100_min10", values)
    regions = pickle.loads(pickle.dumps(open_regions(folder)))
    assert len(regions) == 3 and len(list(regions.keys())) == 3 and regions.beliefs_size == 5
    got = regions.of(row("/coco/COCO_val2014_000000000002.jpg"))
    same(got, full_regions(3, seed=2), ("features", "boxes", "beliefs", "confidence"))
    assert "coco_val2014_000000000003" not in regions and "" not in regions and "x" * 600 not in regions
    assert len(open_regions(folder, regions=1).get("coco_val2014_000000000002")) == 1  # opened twice in one process


class Trap:
    """Unpickling it would leave a trace."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickles_are_refused_and_never_run(tmp_path):
    trap = pickle.dumps({"features": Trap(tmp_path / "ran")})
    folder = write_lmdb(tmp_path / "vilbert.lmdb", {"42": trap, "keys": pickle.dumps([b"42"])})
    with pytest.raises(UserError, match=r"are pickles.*not read.*\.npz"):
        open_regions(folder)
    (tmp_path / "features.pkl").write_bytes(trap)
    with pytest.raises(UserError, match="is a pickle"):
        open_regions(tmp_path / "features.pkl")
    msgpack = pytest.importorskip("msgpack")
    array = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": trap}
    with pytest.raises(BadRegions, match="not read: expected numbers"):
        decode(msgpack.packb({"features": array, "norm_bb": array}))
    assert not (tmp_path / "ran").exists()


def test_damaged_values_are_refused(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    good = as_msgpack(full_regions())
    short = plain(np.zeros((2, 8), np.float32)) | {b"data": b"1234"}
    for bad in (good[:-20], b"\xc1", msgpack.packb([1, 2]), msgpack.packb({"features": short, "norm_bb": short})):
        with pytest.raises(BadRegions):
            decode(bad)


# ------------------------------------------------------------------------------------------------------------ any path


def test_what_is_no_regions(tmp_path):
    for name, message in {"nowhere": "no regions at", "a.h5": "not a form", "empty": "no .npz files"}.items():
        path = tmp_path / name
        if name == "a.h5":
            path.write_bytes(b"\x89HDF")
        elif name == "empty":
            path.mkdir()
        with pytest.raises(UserError, match=message):
            open_regions(path)
