"""EfficientNet-Lite against the PyTorch release it takes its weights from, and the properties fine-tuning rests on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from interlace.data.cache import cache_folder
from interlace.embed.efficientnet_lite import (
    KEYS,
    VARIANTS,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    from_release,
)
from interlace.errors import UserError


def small(**changes) -> EfficientNetLiteModel:
    torch.manual_seed(0)
    return EfficientNetLiteModel(EfficientNetLiteConfig(**{"width": 0.25, "depth": 0.3, "hidden_size": 48, **changes}))


def shake(model: nn.Module) -> nn.Module:
    """Statistics and affines away from 0 and 1, where mistakes would hide."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(tensor, low, high)
    return model


# lite1 and lite3 add nothing that 0, 2 (odd sizes) and 4 (widest) do not show
@pytest.mark.parametrize("variant", ["lite0", "lite2", "lite4"])
def test_parity_with_the_release(variant):
    release = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(1)
    theirs = shake(release.EfficientNet.from_name(f"efficientnet-{variant}")).eval()
    config = EfficientNetLiteConfig.variant(variant)
    ours = EfficientNetLiteModel(config).eval()
    ours.load_state_dict(from_release(theirs.state_dict(), config))
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        output, features, logits = ours(pixels), theirs.extract_features(pixels), theirs(pixels)
    assert features.abs().max() > 0.1
    assert_close(output.feature_map, features, atol=1e-4, rtol=0)
    assert_close(theirs._fc(output.pooler_output), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_parity_with_the_released_weights(variant):
    release = pytest.importorskip("efficientnet_lite_pytorch")
    folder = cache_folder() / "towers" / f"efficientnet-{variant}"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the tower efficientnet-{variant} has not been downloaded")
    state, back = load_file(folder / "model.safetensors"), {}
    for name, value in state.items():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        module, _, leaf = name.rpartition(".")
        back[next(f"{theirs.format(n=block)}.{leaf}" for theirs, ours in KEYS.items()
                  if ours and ours.format(n=block) == module)] = value
    theirs = release.EfficientNet.from_name(f"efficientnet-{variant}").eval()
    missing, unexpected = theirs.load_state_dict(back, strict=False)
    assert set(missing) == {"_fc.weight", "_fc.bias"} and not unexpected
    ours = EfficientNetLiteModel.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)  # theirs pads for this size alone
    with torch.no_grad():
        assert_close(ours(pixels).feature_map, theirs.extract_features(pixels), atol=1e-4, rtol=0)


def test_every_key_of_the_release_is_mapped_and_every_key_of_ours_filled():
    ours = {key.rpartition(".")[0] for key in small(depth=1.0).state_dict()}
    blocks = len(small(depth=1.0).blocks)
    mapped = {value.format(n=n) for value in KEYS.values() if value for n in range(blocks)}
    assert mapped - ours == {"blocks.0.expand.conv", "blocks.0.expand.norm"}  # the first block does not widen
    assert ours - mapped == set()


def test_foreign_weights_are_refused_with_all_the_reasons():
    config = EfficientNetLiteConfig.variant("lite0")
    with pytest.raises(UserError) as error:
        from_release({"_conv_stem.weight": torch.zeros(32, 3, 5, 5), "layer4.0.conv1.weight": torch.zeros(1)}, config)
    message = str(error.value)
    assert "(32, 3, 5, 5), expected (32, 3, 3, 3)" in message
    assert "unknown layer4.0.conv1.weight" in message and "missing" in message


def test_unknown_variant_is_named():
    with pytest.raises(UserError, match=r"lite0.*got 'light0'"):
        EfficientNetLiteConfig.variant("light0")


def test_save_and_load_through_the_auto_classes(tmp_path):
    model = shake(small()).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is EfficientNetLiteModel
    assert AutoConfig.from_pretrained(tmp_path).width == 0.25
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("height, width", [(64, 64), (65, 97), (33, 160)])
def test_the_cells_are_row_major_and_one_per_32_pixels(height, width):
    output = small().eval()(torch.randn(2, 3, height, width))
    h, w = -(-height // 32), -(-width // 32)
    assert output.feature_map.shape == (2, 48, h, w)
    assert output.last_hidden_state.shape == (2, h * w, 48)
    assert torch.equal(output.last_hidden_state[:, w - 1], output.feature_map[:, :, 0, w - 1])
    assert_close(output.pooler_output, output.last_hidden_state.mean(1))


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_frozen_statistics_do_not_move_while_scale_and_shift_learn():
    model = shake(small(freeze_bn=True)).train()
    before = statistics(model)
    model(torch.randn(4, 3, 64, 64)).pooler_output.square().sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.stem.norm.weight.grad.abs().sum() > 0 and model.stem.norm.bias.grad.abs().sum() > 0
    # one sample's output does not depend on its neighbours
    pixels = torch.randn(3, 3, 64, 64)
    assert_close(model(pixels).feature_map[:1], model(pixels[:1]).feature_map, atol=1e-5, rtol=1e-4)


def test_unfrozen_statistics_move():
    model = small().train()
    before = statistics(model)
    model(torch.randn(4, 3, 64, 64))
    assert not torch.equal(before["stem.norm.running_mean"], model.stem.norm.running_mean)


def test_folding_changes_neither_output_nor_gradient():
    model = shake(small(freeze_bn=True)).double().train()
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.double)

    def run():
        model.zero_grad()
        model(pixels).pooler_output.square().sum().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    folded = run()
    for module in model.modules():  # batch_norm itself, on the stored statistics
        if type(module).__name__ == "ConvNorm":
            norm = module.norm
            module.forward = lambda x, m=module, n=norm: n(
                nn.functional.conv2d(*m.pad(x)[:1], m.conv.weight, None, m.stride, m.pad(x)[1], 1, m.conv.groups))
    for name, gradient in run().items():
        assert_close(folded[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_stochastic_depth_keeps_the_expectation_and_spares_evaluation():
    model = small(drop_connect_rate=0.5, freeze_bn=True)
    pixels = torch.randn(1, 3, 32, 32)
    block = next(block for block in model.blocks if block.residual and block.drop)
    block.train()
    block.depthwise.norm.eval()
    x = torch.randn(1, block.project.conv.out_channels, 4, 4).expand(4000, -1, -1, -1)
    for conv_norm in (block.expand, block.depthwise, block.project):
        conv_norm.eval()
    with torch.no_grad():
        mean = block(x).mean(0)
        assert_close(mean, block.eval()(x[:1])[0], atol=0.15, rtol=0)
        assert torch.equal(model.eval()(pixels).feature_map, model(pixels).feature_map)


def test_the_table_of_variants_builds():
    sizes = {}
    for name in VARIANTS:
        with torch.device("meta"):
            model = EfficientNetLiteModel(EfficientNetLiteConfig.variant(name))
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    # the release counts 4.7, 5.4, 6.1, 8.2 and 13.0 million with its 1.28 million of classifier
    assert {name: round((n + 1281000) / 1e6, 1) for name, n in sizes.items()} == {
        "lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0}
