"""Golden tensors: weights, inputs and outputs recorded from the original releases at tiny random sizes.

A test module names its system (`SYSTEM = "uniter"`) and asks for the fixture `golden`; it runs once for each file of
the folder that says so in the JSON beside it, so other sizes are tried with `pytest tests/parity --golden FOLDER`. A
folder may hold some of the systems, several sizes of one, or less of a system than the committed files: what was not
recorded is named at the end.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "golden"
SYSTEMS = ("blip", "lxmert", "uniter", "vilbert", "vilt", "visualbert", "vlbert")
WORST: dict[str, tuple[float, str]] = {}  # file -> the largest difference met, and in which output
ABSENT: dict[str, set[str]] = {}  # file -> what a test asked for and was not recorded


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(HERE), help="folder of NAME.safetensors and NAME.json to compare with")


def folder(config) -> Path:
    return Path(config.getoption("golden", None) or HERE)  # the option is unknown when pytest starts above this folder


def fixtures(where: Path) -> dict[Path, str]:
    """Each file of the folder and its system. Raises UsageError for a folder in which something would go unread."""
    files = sorted(where.glob("*.safetensors"))
    if not files:
        raise pytest.UsageError(f"--golden {where}: no NAME.safetensors there")
    if alone := [f.name for f in files if not f.with_suffix(".json").is_file()]:
        raise pytest.UsageError(f"--golden {where}: no JSON with the sizes beside {', '.join(alone)}")
    systems = {f: json.loads(f.with_suffix(".json").read_text())["model"] for f in files}
    if other := {system for system in systems.values() if system not in SYSTEMS}:
        raise pytest.UsageError(f"--golden {where}: no test reads {', '.join(sorted(other))}; known: {SYSTEMS}")
    return systems


def pytest_configure(config):
    fixtures(folder(config))  # a wrong folder is one error at the start


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        assert metafunc.module.SYSTEM in SYSTEMS
        files = [f for f, system in fixtures(folder(metafunc.config)).items() if system == metafunc.module.SYSTEM]
        metafunc.parametrize("golden", files, ids=[f.stem for f in files], indirect=True, scope="module")


class Recorded(dict[str, Tensor]):
    """Tensors by name, and which of them were looked at. One that is not there ends the test as skipped."""

    def __init__(self, tensors: dict[str, Tensor], file: Path):
        super().__init__(tensors)
        self.seen, self.file = set[str](), file

    def __missing__(self, name: str) -> Tensor:
        ABSENT.setdefault(self.file.stem, set()).add(name)
        pytest.skip(f"{name} was not recorded")

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return super().__getitem__(name)


class Golden:
    """`config`: sizes. `weights`: the main class's state dict under its original names. `inputs`, `outputs` by name."""

    def __init__(self, file: Path):
        self.file = file
        self.meta = json.loads(file.with_suffix(".json").read_text())
        self.config = self.meta["config"]
        self.tensors = load_file(file)
        self.weights = self.part("weights")
        self.inputs, self.outputs = (Recorded(self.below(p), file) for p in ("inputs", "outputs"))
        self.atol, self.rtol = self.meta["compare"]["atol"], self.meta["compare"]["rtol"]

    def below(self, name: str) -> dict[str, Tensor]:
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(name + "/")}

    def part(self, name: str) -> dict[str, Tensor]:
        """`part("weights.vqa")`: the tensors of that group, its name taken off; a test of a group that the recording
        has not is skipped."""
        return self.below(name) or Recorded({}, self.file)[name]  # type: ignore[return-value]

    def close(self, ours: Tensor, name: str, real: Tensor | None = None) -> None:
        """`ours` equals the recorded output, where `real` (a mask over the leading axes) is true."""
        if name not in self.outputs:
            ABSENT.setdefault(self.file.stem, set()).add(name)
            return
        theirs = self.outputs[name]
        assert ours.shape == theirs.shape, f"{name}: ours {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        if real is not None:
            assert real.any()
            ours, theirs = ours[real.bool()], theirs[real.bool()]
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs), name
            return
        largest = (ours - theirs).abs().max().item() if theirs.numel() else 0.0  # no pair of the batch is unmatched
        WORST[self.file.stem] = max(WORST.get(self.file.stem, (0.0, "")), (largest, name))
        torch.testing.assert_close(ours, theirs, atol=self.atol, rtol=self.rtol, msg=lambda m: f"{name}: {m}")


def pytest_terminal_summary(terminalreporter):
    for file, (difference, name) in sorted(WORST.items()):
        terminalreporter.write_line(f"{file}: largest difference from the recording {difference:.1e} ({name})")
    for file, names in sorted(ABSENT.items()):
        terminalreporter.write_line(f"{file}: not recorded, so not compared: {', '.join(sorted(names))}")


@pytest.fixture(scope="module")
def golden(request):
    """At the end of a module that ran whole, every recorded output has been compared with something, and the committed
    files lacked nothing."""
    given = Golden(request.param)
    yield given
    if given.file.parent == HERE:
        assert given.file.stem not in ABSENT, f"no longer recorded: {ABSENT[given.file.stem]}"
    options = request.config.option
    if not (options.keyword or getattr(options, "lf", False) or any("::" in arg for arg in request.config.args)):
        assert not (unread := sorted(given.outputs.keys() - given.outputs.seen)), f"no test reads {unread}"


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
