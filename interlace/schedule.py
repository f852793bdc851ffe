"""A model's body: named segments of layers over two streams."""

from __future__ import annotations

from itertools import groupby

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interlace.errors import UserError
from interlace.layers import Kind, Layer, Norm, Width, build_layer
from interlace.streams import ALL, Asked, Streams, Visibility, take

Segments = dict[str, list[Kind]]  # the boxes of the paper's figure, in order


class Schedule(nn.Module):
    """Runs the segments in order. Segment names become parameter names: `cross.0.attend.query.weight`."""

    def __init__(self, segments: Segments, text: Width, image: Width):
        super().__init__()
        self.names = list(segments)
        for name, kinds in segments.items():
            self.add_module(name, nn.ModuleList(build_layer(kind, text, image) for kind in kinds))
        self.gradient_checkpointing = False

    def layers(self) -> list[Layer]:
        return [layer for name in self.names for layer in getattr(self, name)]

    @property
    def fusion_depth(self) -> int:
        """Index of the first layer in which the streams meet; the number of layers when they never do (late)."""
        layers = self.layers()
        return next((n for n, layer in enumerate(layers) if layer.crosses), len(layers))

    def run(self, streams: Streams, see: Visibility, start: int = 0, stop: int | None = None,
            asked: Asked = ALL) -> Streams:  # fmt: skip
        """Layers `start` to `stop` (exclusive), counted over all segments. `asked`: the states that are returned; of a
        stream's last layer the others are not computed."""
        layers = self.layers()[start:stop]
        wanted = {stream: getattr(asked, stream) for stream in Streams._fields}
        short = {stream: shortened(stream, layers, at) for stream, at in wanted.items()}
        for n, layer in enumerate(layers):
            here = Asked(**{stream: at for stream, at in wanted.items() if n in short[stream]})
            some = layer.shortens and (here.text is not None or here.image is not None)
            given = (streams, see, here) if some else (streams, see)
            if self.gradient_checkpointing and self.training:
                streams = checkpoint(layer, *given, use_reentrant=False)
            else:
                streams = layer(*given)
        rest = (None if short[stream] else at for stream, at in wanted.items())
        return Streams(*(x if x is None else take(x, at) for x, at in zip(streams, rest)))

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        return self.run(streams, see)


def shortened(stream: str, layers: list[Layer], at: Tensor | None) -> range:
    """Numbers of the layers that compute these states of the stream and no others: the last that makes a state out of
    others (a closing norm does not); where none is asked for, those before it too, back to the last in which the other
    stream reads this one. None, where that layer cannot leave states out or a later one may read them."""
    for n in reversed(range(len(layers))):
        if isinstance(layers[n], Norm):
            continue
        if stream in layers[n].changes:
            if at is None or not layers[n].shortens:
                return range(0)
            first = n
            while at.shape[1] == 0 and first and not layers[first].crosses:
                if stream in layers[first - 1].changes and not layers[first - 1].shortens:
                    break
                first -= 1
            return range(first, n + 1)
        if layers[n].crosses:
            return range(0)
    return range(0)


def fused(fusion: str, streams: str, layers: int, norm: str) -> Segments:
    """The segments for one line of a config: where the streams first meet, and whether they share weights.

    fusion   late: never, only pooled vectors meet (CLIP). mid: in the second half (ALBEF, METER). early: from the
             first layer on.
    streams  single: one set of weights, one sequence (UNITER, ViLT). dual: weights of their own, co-attention
             (ViLBERT).
    At a given number of layers and width all three fusions of one streams setting have the same parameters, so that a
    comparison changes one thing only: every `co` replaces a `both`, every `joint` an `each`.
    """
    if fusion not in ("late", "mid", "early"):
        raise UserError(f"fusion is late, mid or early; got {fusion!r}.")
    if streams not in ("single", "dual"):
        raise UserError(f"streams is single or dual; got {streams!r}.")
    if layers < 2 and fusion == "mid":
        raise UserError(f"mid fusion needs at least 2 layers, one before the streams meet and one after; got {layers}.")
    alone = {"late": layers, "mid": layers // 2, "early": 0}[fusion]
    met = layers - alone
    if streams == "single":
        segments = {"apart": [Kind("each")] * alone, "joint": [Kind("joint")] * met}
    else:  # the streams read each other, then each digests what it read
        pattern = [Kind("co"), Kind("both")]
        segments = {"apart": [Kind("both")] * alone, "cross": [pattern[n % 2] for n in range(met)]}
    segments = {name: kinds for name, kinds in segments.items() if kinds}
    if norm == "pre":
        segments["close"] = [Kind("norm", (("shared", True),)) if streams == "single" else Kind("norm")]
    return segments


def describe(segments: Segments) -> str:
    """One line per segment: `cross   co, both, co, both` with runs folded as `both x 6`."""
    lines = []
    for name, kinds in segments.items():
        runs = [(str(kind), len(list(same))) for kind, same in groupby(kinds)]
        if len(runs) > 4 and len(kinds) % 2 == 0 and kinds == kinds[:2] * (len(kinds) // 2):
            text = f"({kinds[0]}, {kinds[1]}) x {len(kinds) // 2}"
        else:
            text = ", ".join(kind if n == 1 else f"{kind} x {n}" for kind, n in runs)
        lines.append(f"{name:10s} {text}")
    return "\n".join(lines)
