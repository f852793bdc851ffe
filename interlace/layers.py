"""Attention, feed-forward, and one small class per kind of layer.

A kind is a class: it names itself, says whether the streams meet in it, and takes and returns `Streams`. Widths and
the place of the norm belong to a stream (`Width`), never to a layer. A kind that only one preset wants lives in that
preset's file; importing the file is enough, since a subclass of `Layer` is known by its `kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interlace.errors import UserError, suggest
from interlace.streams import ALL, Asked, Sight, Streams, Visibility, take

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass
class Width:
    """One stream's shape. `norm`: "post" = LN(x + f(x)) as in BERT, "pre" = x + f(LN(x)) as in ViT."""

    size: int  # D, hidden size
    heads: int = 12
    ffn: int = 0  # inner size of the feed-forward; 0 means 4 * size
    norm: str = "post"
    eps: float = 1e-12  # BERT's; ViT releases use 1e-6
    dropout: float = 0.1  # after every sub-layer
    attention_dropout: float = 0.1  # on attention probabilities
    activation: str = "gelu"

    def __post_init__(self) -> None:
        self.ffn = self.ffn or 4 * self.size
        if self.size % self.heads:
            raise UserError(f"a width of {self.size} does not divide into {self.heads} heads; choose a multiple.")
        if self.norm not in ("pre", "post"):
            raise UserError(f"norm is 'pre' or 'post', got {self.norm!r}.")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {self.activation!r}.{suggest(self.activation, ACTIVATIONS)}")


class Attend(nn.Module):
    """Multi-head attention with its residual and norm: queries of one stream read keys of the same or another.

    `inner` is the size the `heads` work in (ViLBERT's co-attention differs from both streams); default: the reader's.
    """

    def __init__(self, width: Width, context: Width | None = None, inner: int = 0, heads: int = 0):
        super().__init__()
        source, inner = context or width, inner or width.size
        self.heads, self.pre = heads or width.heads, width.norm == "pre"
        if inner % self.heads:
            raise UserError(f"an attention of {inner} does not divide into {self.heads} heads; choose a multiple.")
        self.query = nn.Linear(width.size, inner)
        self.key = nn.Linear(source.size, inner)
        self.value = nn.Linear(source.size, inner)
        self.out = nn.Linear(inner, width.size)
        self.norm = nn.LayerNorm(width.size, eps=width.eps)
        if context is not None and self.pre:  # a pre-norm stream hands on un-normed states; the reader norms them
            self.norm_context = nn.LayerNorm(source.size, eps=width.eps)
        self.dropout = nn.Dropout(width.dropout)
        self.attention_dropout = width.attention_dropout

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D/H)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key(context)), self.split(self.value(context))

    def read(self, x: Tensor, context: Tensor, see: Sight | None) -> Tensor:
        """(B, Q, D), (B, K, C) -> (B, Q, D): what the queries read, before residual and norm."""
        query = self.split(self.query(x))
        key, value = self.keys(context) if see is None or see.memory is None else see.memory(self, context)
        drop = self.attention_dropout if self.training else 0.0
        mask = None if see is None else see.mask
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)  # (B, H, Q, D/H)
        if see is not None:
            out = out * see.alive  # a query that may see nothing reads zero
        return self.out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Tensor | None, see: Sight | None, at: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). `context` None: x attends to itself. `at` (B or 1, n): only these of x look, and only
        what becomes of them is returned, (B, n, D)."""
        if at is not None and not at.shape[1]:
            return take(x, at)  # nobody asks: (B, 0, D)
        see = see if see is None else see.of(at)
        if self.pre:
            own = self.norm(x)
            source = own if context is None else self.norm_context(context)
            return take(x, at) + self.dropout(self.read(take(own, at), source, see))
        asking = take(x, at)
        return self.norm(asking + self.dropout(self.read(asking, x if context is None else context, see)))


class FeedForward(nn.Module):
    """Two linears with their residual and norm."""

    def __init__(self, width: Width):
        super().__init__()
        self.pre = width.norm == "pre"
        self.up, self.down = nn.Linear(width.size, width.ffn), nn.Linear(width.ffn, width.size)
        self.norm = nn.LayerNorm(width.size, eps=width.eps)
        self.dropout = nn.Dropout(width.dropout)
        self.activation = ACTIVATIONS[width.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        if self.pre:
            return x + self.dropout(self.down(self.activation(self.up(self.norm(x)))))
        return self.norm(x + self.dropout(self.down(self.activation(self.up(x)))))


class Block(nn.Module):
    """Self-attention, then feed-forward: the transformer block of one stream."""

    def __init__(self, width: Width):
        super().__init__()
        self.attend, self.ffn = Attend(width), FeedForward(width)

    def forward(self, x: Tensor, see: Sight | None, at: Tensor | None = None) -> Tensor:
        return self.ffn(self.attend(x, None, see, at))


# ---------------------------------------------------------------------------------------------- kinds of layers


@dataclass(frozen=True)
class Kind:
    """A line of a schedule: which kind of layer, with which options. Hashable, and goes into config.json."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name + ("(" + ", ".join(f"{k}={v}" for k, v in self.options) + ")" if self.options else "")

    def __mul__(self, n: int):  # so that a schedule reads [TEXT] * 9 and never TEXT * 9 by accident
        raise TypeError(f"write [{self.name.upper()}] * {n}: a segment is a list of layers")


class Layer(nn.Module):
    """A kind of layer. Subclasses set `kind`, `crosses` (do the streams meet here?) and, where it is not both,
    `changes` (which streams leave it other than they came), and write `forward`. One that `shortens` takes `asked` as
    well, and computes no other states of the streams that it changes."""

    kind: ClassVar[str] = ""
    crosses: ClassVar[bool] = False
    shortens: ClassVar[bool] = False
    changes: tuple[str, ...] = ("text", "image")
    kinds: ClassVar[dict[str, type[Layer]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "shortens" not in vars(cls):
            cls.shortens = False  # a forward of its own takes no `asked` unless it says so, whatever it inherits
        if cls.kind:
            Layer.kinds[cls.kind] = cls

    def __init__(self, text: Width, image: Width):
        super().__init__()

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        raise TypeError(f"{type(self).__name__} has to say what it does with the streams: write its forward()")


def build_layer(kind: Kind, text: Width, image: Width) -> Layer:
    """The layer a line of the schedule names. Raises UserError for a kind that no class has."""
    if kind.name not in Layer.kinds:
        import interlace.presets  # noqa: F401  a preset's own kind is known once its file is imported
    if kind.name not in Layer.kinds:
        known = ", ".join(sorted(Layer.kinds))
        raise UserError(f"no kind of layer is called {kind.name!r} (known: {known}).{suggest(kind.name, Layer.kinds)}")
    return Layer.kinds[kind.name](text, image, **dict(kind.options))


class Text(Layer):
    """The text attends to itself; the image passes."""

    kind = "text"
    changes = ("text",)
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        self.attend, self.ffn = Attend(text), FeedForward(text)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        if streams.text is None:
            return streams
        return Streams(self.ffn(self.attend(streams.text, None, see.sight("tt"), asked.text)), streams.image)


class Image(Layer):
    """The image attends to itself; the text passes."""

    kind = "image"
    changes = ("image",)
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        self.attend, self.ffn = Attend(image), FeedForward(image)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        if streams.image is None:
            return streams
        return Streams(streams.text, self.ffn(self.attend(streams.image, None, see.sight("ii"), asked.image)))


class Both(Layer):
    """Each stream attends to itself, with weights of its own."""

    kind = "both"
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        self.text, self.image = Block(text), Block(image)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        text = streams.text if streams.text is None else self.text(streams.text, see.sight("tt"), asked.text)
        image = streams.image if streams.image is None else self.image(streams.image, see.sight("ii"), asked.image)
        return Streams(text, image)


def _one_width(text: Width, image: Width, kind: str) -> None:
    if text != image:
        raise UserError(f"a {kind!r} layer has one set of weights for both streams, so their widths must be equal; "
                        f"got text {text} and image {image}.")  # fmt: skip


class Each(Layer):
    """One block serves both streams, each attending only to itself: a single-stream layer before the streams meet."""

    kind = "each"
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        _one_width(text, image, self.kind)
        self.attend, self.ffn = Attend(text), FeedForward(text)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        def block(x: Tensor | None, sight: Sight | None, at: Tensor | None) -> Tensor | None:
            return None if x is None else self.ffn(self.attend(x, None, sight, at))

        return Streams(block(streams.text, see.sight("tt"), asked.text),
                       block(streams.image, see.sight("ii"), asked.image))  # fmt: skip


class Joint(Layer):
    """Both streams are one sequence: every query sees words and image cells in one softmax. UNITER, ViLT, VisualBERT.

    With one stream absent it attends to what is there.
    """

    kind = "joint"
    crosses = True
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        _one_width(text, image, self.kind)
        self.attend, self.ffn = Attend(text), FeedForward(text)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        text, image = streams
        if text is None or image is None:
            sight, at = see.sight("ii" if text is None else "tt"), asked.image if text is None else asked.text
            x = self.ffn(self.attend(image if text is None else text, None, sight, at))
            return Streams(None, x) if text is None else Streams(x, None)
        words, cells = text.shape[1], image.shape[1]
        x = torch.cat([text, image], 1)  # (B, T+I, D)
        x = self.ffn(self.attend(x, None, see.joint(words, cells), asked.joint(words, cells, x.device)))
        words = words if asked.text is None else asked.text.shape[1]
        return Streams(x[:, :words], x[:, words:])


class Co(Layer):
    """Each stream reads the other, both from the states before the layer. ViLBERT; tied and without FFN: LXMERT.

    `tied`: one attention (its norm too) serves both directions. `ffn`: a feed-forward follows. `inner`, `heads`: the
    attention's size and heads, where they differ from the streams' (ViLBERT). With one stream absent it passes.
    """

    kind = "co"
    crosses = True
    shortens = True

    def __init__(self, text: Width, image: Width, tied: bool = False, ffn: bool = True, inner: int = 0, heads: int = 0):
        super().__init__(text, image)
        if tied:
            _one_width(text, image, "co(tied)")
            self.attend = Attend(text, image, inner, heads)
        else:
            self.text_attend, self.image_attend = Attend(text, image, inner, heads), Attend(image, text, inner, heads)
        self.tied, self.ffn = tied, ffn
        if ffn:
            self.text_ffn, self.image_ffn = FeedForward(text), FeedForward(image)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        if streams.text is None or streams.image is None:
            return Streams(*(x if x is None else take(x, at) for x, at in zip(streams, (asked.text, asked.image))))
        by_text, by_image = (self.attend, self.attend) if self.tied else (self.text_attend, self.image_attend)
        text = by_text(streams.text, streams.image, see.sight("ti"), asked.text)
        # the old text: both read before either writes
        image = by_image(streams.image, streams.text, see.sight("it"), asked.image)
        return Streams(self.text_ffn(text), self.image_ffn(image)) if self.ffn else Streams(text, image)


class Read(Layer):
    """The text attends to itself, then to the image; the image is only read. BLIP (arXiv:2201.12086), figure 2.

    n * B texts may read B images, n each, one after the other: beams, or many answers to one question.
    """

    kind = "read"
    crosses = True
    changes = ("text",)
    shortens = True

    def __init__(self, text: Width, image: Width):
        super().__init__(text, image)
        self.attend_self, self.attend_image, self.ffn = Attend(text), Attend(text, image), FeedForward(text)

    def forward(self, streams: Streams, see: Visibility, asked: Asked = ALL) -> Streams:
        if streams.text is None:
            return streams
        text = self.attend_self(streams.text, None, see.sight("tt"), asked.text)  # (B, T, D)
        if streams.image is not None:
            beside = text.reshape(len(streams.image), -1, text.shape[-1])  # texts of one image read it side by side
            seen = see.sight("ti")
            seen = seen if seen is None else seen.of(asked.text)
            text = self.attend_image(beside, streams.image, seen).view_as(text)  # (B, T, D)
        return Streams(self.ffn(text), streams.image)


class Norm(Layer):
    """The closing norm of pre-norm streams. `shared`: one norm over the joint sequence (ViLT)."""

    kind = "norm"

    def __init__(self, text: Width, image: Width, shared: bool = False, stream: str = "both"):
        super().__init__(text, image)
        self.shared = shared
        self.changes = ("text", "image") if shared or stream == "both" else (stream,)
        if shared:
            _one_width(text, image, "norm(shared)")
            self.norm = nn.LayerNorm(text.size, eps=text.eps)
        else:
            self.text = nn.LayerNorm(text.size, eps=text.eps) if stream in ("both", "text") else nn.Identity()
            self.image = nn.LayerNorm(image.size, eps=image.eps) if stream in ("both", "image") else nn.Identity()

    def forward(self, streams: Streams, see: Visibility) -> Streams:
        text, image = (self.norm, self.norm) if self.shared else (self.text, self.image)
        return Streams(
            None if streams.text is None else text(streams.text),
            None if streams.image is None else image(streams.image),
        )


TEXT, IMAGE, BOTH, EACH = Kind("text"), Kind("image"), Kind("both"), Kind("each")
JOINT, CO, READ, NORM = Kind("joint"), Kind("co"), Kind("read"), Kind("norm")


def co(**options: Any) -> Kind:
    """`CO` with options: `tied`, `ffn`, `inner`, `heads`."""
    return Kind("co", tuple(sorted(options.items())))


def norm(**options: Any) -> Kind:
    """`NORM` with options: `shared`, `stream`."""
    return Kind("norm", tuple(sorted(options.items())))
