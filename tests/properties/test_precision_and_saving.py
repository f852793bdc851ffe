"""Weights that go to a file and come back, and arithmetic in bfloat16."""

import pytest
import torch
from properties.systems import EVERY_SYSTEM, real
from safetensors.torch import load_file

BOUND = 0.03  # of an output's length; bfloat16 has 8 bits, so a step is 0.4%


def plain(config):
    """What a model is; not where it was read from and by which version."""
    facts = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    return {k: plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in facts}


@EVERY_SYSTEM
@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same_bits(system, tmp_path):
    model, batch = system.model(), system.batch()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ours, theirs = real(system.run(again, batch)), real(system.run(model, batch))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name
    assert plain(again.config.to_dict()) == plain(model.config.to_dict())


@EVERY_SYSTEM
def test_a_file_holds_each_weight_once(system, tmp_path):
    """Tied and borrowed weights too: as many numbers on disk as the model has."""
    model = system.model()
    model.save_pretrained(tmp_path)
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert saved == sum(p.numel() for p in model.parameters()) + buffers


@EVERY_SYSTEM
@torch.no_grad()
def test_bfloat16_is_near_float32(system):
    model, batch = system.model(), system.batch()
    exact = real(system.run(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = real(system.run(model, batch))
    for name, expected in exact.items():
        error = (rounded[name].float() - expected).norm() / expected.norm()
        assert 0 < error < BOUND or (error == 0 and not expected.any()), (name, error)


@EVERY_SYSTEM
def test_losses_in_bfloat16_are_near_those_in_float32_and_finite(system):
    batch = system.batch(8)
    losses = []
    for enabled in (False, True):
        model = system.build()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            step = system.learning(model, batch)()
        sum(step.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        losses.append({name: loss.item() for name, loss in step.items()})
    for name, expected in losses[0].items():
        assert losses[1][name] == pytest.approx(expected, rel=BOUND, abs=0.01), name
