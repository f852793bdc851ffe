"""A kind of layer of one's own, a model that uses it, and a run folder of that model.

    python docs/examples/gated_read.py train furniture runs/gated --steps 20
    python docs/examples/gated_read.py index runs/gated furniture

Any other verb is the ordinary command line, which knows the new kind because this file has been imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from interlace.config import VLConfig
from interlace.data.batches import Collate, EpochSampler, Samples
from interlace.data.processor import Processor
from interlace.data.rows import Source
from interlace.data.sources import open_source
from interlace.embed.patches import Patches
from interlace.embed.words import Words
from interlace.layers import IMAGE, NORM, TEXT, Attend, FeedForward, Kind, Layer, Width
from interlace.learner import Learner
from interlace.objectives import ITC, ITM
from interlace.run import save_run
from interlace.streams import Streams, Visibility


class GatedRead(Layer):
    """The text attends to itself, then reads the image through a gate that starts shut: at step 0 the model is the one
    without pictures. Alayrac et al. 2022 (Flamingo, arXiv:2204.14198), section 2.2."""

    kind = "gated_read"  # the name in config.json
    crosses = True  # the streams meet here

    def __init__(self, text: Width, image: Width, start: float = 0.0):
        super().__init__(text, image)
        self.attend_self, self.attend_image, self.ffn = Attend(text), Attend(text, image), FeedForward(text)
        self.gate = nn.Parameter(torch.tensor(start))

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        if streams.text is None:
            return streams
        text = self.attend_self(streams.text, None, see.sight("tt"))  # (B, T, D)
        if streams.image is not None:
            read = self.attend_image(text, streams.image, see.sight("ti"))  # (B, T, D)
            text = text + self.gate.tanh() * (read - text)
        return Streams(self.ffn(text), streams.image)


GATED_READ = Kind("gated_read")


def config(vocabulary: int, size: int = 96, patch: int = 16, width: int = 64, **changes) -> VLConfig:
    """Two small encoders, then two layers in which the text reads the image."""
    shape = Width(width, heads=4, norm="pre", eps=1e-6)
    return VLConfig(
        text=Words(shape, pool="mean", vocabulary=vocabulary, positions=40),
        image=Patches(shape, pool="mean", size=size, patch=patch),
        segments={"words": [TEXT], "cells": [IMAGE], "fuse": [GATED_READ] * 2, "close": [NORM]},
        # the contrast is taken before the fusion layers, so before the closing norm: it norms for itself
        heads={"contrast": {"size": width, "norm": True}, "match": {}},
        **changes,
    )


def train(source: Source, tokenizer, out: str | Path, steps: int, batch: int = 32, **shape: int) -> Path:
    """A plain loop over the library's samples and objectives; writes a run folder that every command takes."""
    torch.manual_seed(0)
    learner = Learner(config(len(tokenizer), **shape)).learn_by([(ITC(), 1.0), (ITM(), 1.0)])
    spec = learner.config.image
    processor = Processor(tokenizer, spec.size, spec.mean, spec.std)
    samples = Samples(source, "train", processor, [o for o, _ in learner.objectives], seed=0)
    order = EpochSampler(len(samples), seed=0)
    loader = DataLoader(samples, batch, sampler=order, collate_fn=Collate(processor), drop_last=True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    step = 0
    while step < steps:
        for one in loader:
            scored = learner(**one)
            optimizer.zero_grad()
            scored["loss"].backward()
            optimizer.step()
            step += 1
            if step % 5 == 0 or step == steps:
                print(step, {name: round(value.item(), 3) for name, value in scored["losses"].items()}, flush=True)
            if step == steps:
                break
        order.set_epoch(order.epoch + 1)
    return save_run(out, learner, processor, steps=steps, data=source.name)


def main(argv: list[str]) -> int:
    if argv[:1] != ["train"]:
        from interlace.cli import main as interlace

        return interlace(argv)
    from interlace.towers import load_tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv[1:])
    print(train(open_source(args.source), load_tokenizer("minilm"), args.out, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
