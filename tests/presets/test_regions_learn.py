"""The tiny single-stream presets learn to read masked words off the picture."""

import pytest
import torch

from interlace.embed.regions import Regions, seven
from interlace.model import VLModel
from interlace.objectives.mlm import masked_words
from interlace.presets import uniter, visual_bert, vl_bert

CLASSES = 6


def pairs(preset, draw, rows=24):
    """Region 1 shows one of the classes, the others noise, region 0 is their mean; the text names the class twice."""
    shown = torch.randint(CLASSES, (rows,), generator=draw)
    features = 0.3 * torch.randn(rows, 4, 20, generator=draw)
    features[torch.arange(rows), 1, shown] += 5
    features[:, 0] = features[:, 1:].mean(1)
    corners = torch.rand(rows, 4, 2, generator=draw) / 2
    boxes = torch.cat([corners, corners + 0.3], -1)
    boxes = {uniter: seven(boxes), visual_bert: None, vl_bert: boxes}[preset]
    return torch.stack([10 + shown, 30 + shown], 1), Regions(features, boxes)


@pytest.mark.parametrize("preset", [uniter, visual_bert, vl_bert], ids=lambda p: p.__name__.split(".")[-1])
def test_masked_words_are_read_off_the_picture(preset):
    torch.manual_seed(0)
    model, draw = VLModel(preset.tiny()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def step():
        words, regions = pairs(preset, draw)
        hidden = torch.tensor([[2, 4, 4, 3]]).expand(len(words), -1)  # [CLS] [MASK] [MASK] [SEP]
        logits = model.heads["mlm"](model(hidden, regions).text[:, 1:3], model.text.words.weight)
        return masked_words(logits, words), (logits.argmax(-1) == words).float().mean()

    first = step()[0].item()
    for _ in range(80):
        loss, _ = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss, right = step()
    assert loss < first / 5 and right > 0.9, (loss, right)  # words alone: log 6, which is 0.4 of the first
