"""ViLT against transformers' classes with random weights. (Those draw the order of patches, so text is compared.)"""

import pytest
import torch
from transformers import ViltConfig, ViltForMaskedLM, ViltForQuestionAnswering

from interlace.layers import Width
from interlace.model import VLModel
from interlace.presets import vilt
from interlace.weights import load_foreign

IDS = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 3, 0, 0, 0]])
MASK = (IDS != 0).long()
PIXEL_MASK = torch.zeros(2, 32, 48)
PIXEL_MASK[0], PIXEL_MASK[1, :24, :32] = 1, 1


@pytest.mark.parametrize("cls,head", [(ViltForMaskedLM, "mlm"), (ViltForQuestionAnswering, "answers")])
def test_logits(cls, head):
    torch.manual_seed(0)
    theirs = cls(ViltConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128,
                            vocab_size=99, image_size=32, patch_size=8, max_position_embeddings=16, layer_norm_eps=1e-6,
                            num_labels=7, max_image_length=-1)).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    heads = {"mlm": vilt.words(99)} if head == "mlm" else {"answers": vilt.answers(7)}
    width = Width(32, heads=4, norm="pre", eps=1e-6, attention_dropout=0.0)
    text = {"vocabulary": 99, "positions": 16, "eps": 1e-6}  # transformers has one epsilon
    if head == "mlm":
        heads["mlm"] |= {"eps": 1e-6}
    ours = VLModel(vilt.vilt(width, 2, text, {"size": 32, "patch": 8}, heads=heads)).eval()
    load_foreign(ours, theirs.state_dict(), vilt.HF_KEYS)
    pixels = torch.randn(2, 3, 32, 48)
    expected = theirs(input_ids=IDS, attention_mask=MASK, pixel_values=pixels, pixel_mask=PIXEL_MASK.long()).logits
    out = ours(IDS, pixels, MASK, PIXEL_MASK)
    logits = ours.heads[head](out.text if head == "mlm" else out.pooled_text)
    if head == "mlm":
        logits, expected = logits[MASK.bool()], expected[MASK.bool()]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
