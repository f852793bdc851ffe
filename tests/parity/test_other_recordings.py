"""`pytest tests/parity --golden FOLDER`: recordings of other sizes, of less than those here, and wrong folders."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    where = [str(HERE / test) for test in tests] or [str(HERE)]
    return subprocess.run([sys.executable, "-m", "pytest", *where, "--golden", str(folder), "-p", "no:cacheprovider"],
                          capture_output=True, text=True, cwd=HERE.parents[1])  # fmt: skip


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(meta))


def twice(name: str, value: torch.Tensor) -> torch.Tensor:
    """The batch after itself: what is computed row by row comes twice, and means stay."""
    if name.startswith("weights") or "nlvr2_" in name or "position_ids" in name or not value.dim():
        return value
    return torch.cat([value, value])


def test_another_batch_more_types_and_no_answers(tmp_path):
    tensors, meta = (
        load_file(HERE / "golden/uniter-a.safetensors"),
        json.loads(Path(HERE / "golden/uniter-a.json").read_text()),
    )
    tensors = {k: twice(k, v) for k, v in tensors.items() if "vqa" not in k}
    types = "weights/uniter.embeddings.token_type_embeddings.weight"
    tensors[types] = torch.cat([tensors[types], torch.ones(3, meta["config"]["hidden_size"])])
    meta["config"]["type_vocab_size"] = 5
    write(tmp_path, "any-name", tensors, meta)
    out = run(tmp_path, "test_uniter.py", "test_lxmert.py")
    assert out.returncode == 0, out.stdout[-3000:]
    assert "any-name: not recorded, so not compared: weights.vqa" in out.stdout
    assert "any-name: largest difference from the recording" in out.stdout


def test_a_difference_in_a_folder_elsewhere_fails(tmp_path):
    tensors, meta = load_file(HERE / "golden/vilt-a.safetensors"), json.loads((HERE / "golden/vilt-a.json").read_text())
    tensors["outputs/cls_feats"][0, 0] += 1e-3
    write(tmp_path, "vilt-b", tensors, meta)
    out = run(tmp_path, "test_vilt.py")
    assert out.returncode == 1 and "cls_feats" in out.stdout and "1 failed" in out.stdout, out.stdout[-3000:]


def test_a_folder_in_which_something_would_go_unread(tmp_path):
    def complaint() -> str:
        out = run(tmp_path, "test_vilt.py")
        assert out.returncode == 4, out.stdout
        return out.stderr

    assert "no NAME.safetensors there" in complaint()
    save_file({"weights/x": torch.zeros(1)}, tmp_path / "albef-a.safetensors")
    assert "no JSON with the sizes beside albef-a.safetensors" in complaint()
    (tmp_path / "albef-a.json").write_text('{"model": "albef"}')
    assert "no test reads albef" in complaint()
