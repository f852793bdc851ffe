"""Golden tensors: weights, inputs and outputs recorded from the original releases at tiny random sizes.

A test module names its system (`SYSTEM = "uniter"`) and asks for the fixture `golden`; it runs once for each file
`uniter-*.safetensors` in the folder, so other sizes are tried with `pytest tests/parity --golden FOLDER`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "golden"
WORST: dict[str, tuple[float, str]] = {}  # file -> the largest difference met, and in which output


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(HERE), help="folder of NAME-*.safetensors and NAME-*.json to compare with")


def folder(config) -> Path:
    return Path(config.getoption("golden", None) or HERE)  # the option is unknown when pytest starts above this folder


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        files = sorted(folder(metafunc.config).glob(f"{metafunc.module.SYSTEM}-*.safetensors"))
        metafunc.parametrize("golden", files, ids=[f.stem for f in files], indirect=True, scope="module")


class Recorded(dict[str, Tensor]):
    """Outputs by name, and which of them were looked at."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.seen: set[str] = set()

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
        self.weights, self.inputs, self.outputs = (self.part(p) for p in ("weights", "inputs", "outputs"))
        self.outputs = Recorded(self.outputs)
        self.atol, self.rtol = self.meta["compare"]["atol"], self.meta["compare"]["rtol"]

    def part(self, name: str) -> dict[str, Tensor]:
        """`part("weights.vqa")`: the tensors of that group, its name taken off."""
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(name + "/")}

    def close(self, ours: Tensor, name: str, real: Tensor | None = None) -> None:
        """`ours` equals the recorded output, where `real` (a mask over the leading axes) is true."""
        theirs = self.outputs[name]
        assert ours.shape == theirs.shape, f"{name}: ours {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        if real is not None:
            assert real.any()
            ours, theirs = ours[real.bool()], theirs[real.bool()]
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs), name
            return
        WORST[self.file.stem] = max(WORST.get(self.file.stem, (0.0, "")), ((ours - theirs).abs().max().item(), name))
        torch.testing.assert_close(ours, theirs, atol=self.atol, rtol=self.rtol, msg=lambda m: f"{name}: {m}")


def pytest_terminal_summary(terminalreporter):
    for file, (difference, name) in sorted(WORST.items()):
        terminalreporter.write_line(f"{file}: largest difference from the recording {difference:.1e} ({name})")


@pytest.fixture(scope="module")
def golden(request):
    """At the end of a module that ran whole, every recorded output has been compared with something."""
    given = Golden(request.param)
    yield given
    options = request.config.option
    if not (options.keyword or options.lf or any("::" in arg for arg in request.config.args)):
        assert not (unread := sorted(given.outputs.keys() - given.outputs.seen)), f"no test reads {unread}"


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
