"""Tables of names: every form of a line, both directions, and what a wrong file is told."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from interlace.errors import UserError
from interlace.model import VLModel
from interlace.presets import uniter, visual_bert
from interlace.weights import Copies, Flip, Lead, load_foreign, read_release, save_foreign

KEYS = {
    "emb.word": "words",
    "head.decoder.weight": "words.weight",
    "layer.{n}.qkv": ("layers.{2n}.query", "layers.{2n}.key", "layers.{2n}.value"),
    "layer.{n}.out": "layers.{2n}.out",
    "odd.{n+1}": "layers.{2n+1}.only",
    "proj": Flip("proj.weight"),
    "cls": Lead("cls"),
    "norm": Copies(("norm_a", "norm_b")),
    "types.weight": ("text_types", "image_types"),
    "ids": None,
}


class Block(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(4, 4))


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        whole = ("query", "key", "value", "out")
        self.layers = nn.ModuleList([Block(whole), Block(["only"]), Block(whole), Block(["only"])])
        self.proj = nn.Linear(4, 3, bias=False)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.norm_a, self.norm_b = nn.LayerNorm(4), nn.LayerNorm(4)
        self.text_types, self.image_types = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(2, 4))


def release():
    torch.manual_seed(0)
    words = torch.randn(7, 4)
    out = {"emb.word.weight": words, "head.decoder.weight": words, "proj": torch.randn(4, 3), "cls": torch.randn(4),
           "norm.weight": torch.randn(4), "norm.bias": torch.randn(4), "types.weight": torch.randn(3, 4),
           "ids": torch.arange(5)}  # fmt: skip
    for n in range(2):
        out |= {f"layer.{n}.qkv.weight": torch.randn(12, 4), f"layer.{n}.qkv.bias": torch.randn(12),
                f"layer.{n}.out.weight": torch.randn(4, 4), f"layer.{n}.out.bias": torch.randn(4),
                f"odd.{n + 1}.weight": torch.randn(4, 4), f"odd.{n + 1}.bias": torch.randn(4)}  # fmt: skip
    return out


def test_every_form_of_a_line_lands_where_it_says():
    model, theirs = Ours(), release()
    report = load_foreign(model, theirs, KEYS)
    assert torch.equal(model.layers[2].key.weight, theirs["layer.1.qkv.weight"][4:8])
    assert torch.equal(model.layers[2].value.bias, theirs["layer.1.qkv.bias"][8:])
    assert torch.equal(model.layers[3].only.bias, theirs["odd.2.bias"])
    assert torch.equal(model.proj.weight, theirs["proj"].t())
    assert torch.equal(model.cls[0, 0], theirs["cls"])
    assert torch.equal(model.norm_a.weight, theirs["norm.weight"])
    assert torch.equal(model.norm_b.bias, theirs["norm.bias"])
    assert torch.equal(model.image_types, theirs["types.weight"][1:])
    assert report.dropped == ["ids"] and set(report.mapped) == set(theirs) - {"ids"} and not report.fresh


def test_there_and_back_is_the_same_file():
    model, theirs = Ours(), {f"module.{name}": tensor for name, tensor in release().items()}
    load_foreign(model, theirs, KEYS, prefix="module.")
    back = save_foreign(model, KEYS, prefix="module.")
    assert set(back) == set(theirs) - {"module.ids"}
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name]), name


def test_what_is_written_back_fits_a_safetensors_file(tmp_path):
    model = Ours()
    load_foreign(model, release(), KEYS)
    save_file(save_foreign(model, KEYS), tmp_path / "back.safetensors")  # refuses tensors that share memory
    assert torch.equal(read_release(tmp_path / "back.safetensors")["head.decoder.weight"], model.words.weight)


def test_half_precision_files_become_the_models_own_type():
    model = Ours()
    load_foreign(model, {name: t.half() for name, t in release().items()}, KEYS)
    assert model.words.weight.dtype == torch.float32


def test_everything_wrong_is_told_at_once_and_nothing_is_loaded():
    model, theirs = Ours(), release()
    before = model.words.weight.clone()
    theirs["surprise.weight"] = theirs.pop("proj")
    theirs["layer.0.out.weight"] = torch.randn(5, 4)
    theirs["head.decoder.weight"] = torch.randn(7, 4)
    theirs["layer.7.out.weight"] = torch.randn(4, 4)
    with pytest.raises(UserError) as told:
        load_foreign(model, theirs, KEYS)
    for words in ("surprise.weight", "proj.weight", "expected (4, 4), got (5, 4)", "another size",
                  "one tensor here", "layers.14.out.weight, which the model does not have"):  # fmt: skip
        assert words in str(told.value)
    assert torch.equal(model.words.weight, before)


def test_a_forgotten_prefix_is_suggested():
    with pytest.raises(UserError, match=r"prefix='module\.'"):
        load_foreign(Ours(), {f"module.{name}": t for name, t in release().items()}, KEYS)


def test_the_file_of_another_system_is_recognised():
    theirs = save_foreign(VLModel(uniter.tiny()), uniter.KEYS)
    with pytest.raises(UserError, match=r"look like the release of 'uniter' \(100%"):
        load_foreign(VLModel(visual_bert.tiny()), theirs, visual_bert.KEYS)


def test_a_head_the_model_lacks_is_dropped_by_name_and_another_size_is_explained():
    theirs = save_foreign(VLModel(uniter.tiny()), uniter.KEYS)
    report = load_foreign(VLModel(uniter.tiny(heads={})), theirs, uniter.KEYS)
    assert "itm_output.weight" in report.dropped and "uniter.pooler.dense.weight" in report.mapped
    with pytest.raises(UserError, match="build the model with the sizes of the release"):
        load_foreign(VLModel(uniter.tiny(image=uniter.UNITERRegions(uniter.Width(32, heads=4), features=24))), theirs,
                     uniter.KEYS)  # fmt: skip


def test_a_new_part_may_keep_its_start_only_when_named():
    model, theirs = Ours(), release()
    del theirs["proj"]
    with pytest.raises(UserError, match=r"Not in the file \(1 tensors of the model\): proj\.weight"):
        load_foreign(model, theirs, KEYS)
    assert load_foreign(model, theirs, KEYS, fresh=["proj"]).fresh == ["proj.weight"]


def test_a_part_without_a_foreign_name_cannot_be_exported():
    model = Ours()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"extra\.weight, extra\.bias"):
        save_foreign(model, KEYS)


def test_files_of_tensors_open_and_others_are_refused(tmp_path):
    torch.save({"state_dict": release(), "epoch": 3}, tmp_path / "a.model")
    assert set(read_release(tmp_path / "a.model")) == set(release())
    torch.save({"state_dict": release(), "args": Ours()}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"no file of plain tensors \(it asks for \S*Ours\)") as told:
        read_release(tmp_path / "b.pt")
    assert "weights_only" not in str(told.value) and "\x1b" not in str(told.value)  # torch's advice is to run it
    whole = (tmp_path / "a.model").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"hello", b""):
        (tmp_path / "d.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged, or not written by"):
            read_release(tmp_path / "d.pt")
    save_file({name: value.clone() for name, value in release().items()}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"hello", b""):
        (tmp_path / "e.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"e\.safetensors is no safetensors file, or half of one .*copy it again"):
            read_release(tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="no file"):
        read_release(tmp_path / "c.pt")
