"""CLIP against transformers' CLIPModel with random weights: both towers, pooling at [EOS], the contrast."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from interlace.model import VLModel
from interlace.presets import clip
from interlace.weights import load_foreign, save_foreign

IDS = torch.tensor([[97, 5, 6, 7, 8, 98], [97, 5, 98, 0, 0, 0], [97, 40, 41, 42, 98, 98]])  # padded with 0, with [EOS]


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
            "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98, "bos_token_id": 97,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for parameter in model.parameters():  # biases and norms too, or half of the names are not checked
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() else None
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    model = VLModel(clip.tiny()).eval()
    report = load_foreign(model, theirs.state_dict(), clip.HF_KEYS)
    assert not report.dropped and not report.fresh
    return model


@pytest.mark.parametrize("with_mask", [False, True])
def test_both_towers_and_the_contrast(theirs, ours, with_mask):
    pixels = torch.randn(3, 3, 32, 32)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]) if with_mask else None
    expected = theirs(input_ids=IDS, pixel_values=pixels, attention_mask=mask)
    out = ours(IDS, pixels, mask)
    text, image = ours.encode_text(IDS, mask), ours.encode_image(pixels)
    states = theirs.vision_model.post_layernorm(expected.vision_model_output.last_hidden_state)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)  # noqa: E731
    real = torch.tensor([6, 3, 5])
    for row, length in enumerate(real):
        close(out.text[row, :length], expected.text_model_output.last_hidden_state[row, :length])
    close(out.image, states)
    close(text, expected.text_embeds)
    close(image, expected.image_embeds)
    close(ours.heads["contrast"].scale * text @ image.T, expected.logits_per_text)


def test_the_release_names_hold_the_same_weights(theirs, ours):
    release = save_foreign(ours, clip.KEYS)
    state = theirs.state_dict()
    layer = "text_model.encoder.layers.1.self_attn"
    fused = torch.cat([state[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(release["transformer.resblocks.1.attn.in_proj_weight"], fused)
    assert torch.equal(release["visual.proj"], state["visual_projection.weight"].T)
    assert release["visual.class_embedding"].shape == (48,) and release["visual.positional_embedding"].shape == (17, 48)
    again = VLModel(clip.tiny())
    load_foreign(again, release, clip.KEYS)
    for (name, a), b in zip(again.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(a, b), name


def test_names_of_transformers_both_ways(theirs, ours):
    back = save_foreign(ours, clip.HF_KEYS)
    assert set(back) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value), name
