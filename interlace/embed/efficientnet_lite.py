"""EfficientNet-Lite 0-4: MobileNet-style convolution towers small enough to fine-tune on a CPU.

EfficientNet (Tan & Le 2019, arXiv:1905.11946) without squeeze-and-excitation and with ReLU6 in place of swish; the stem
and the head keep their width while the body scales. An ordinary transformers model: `save_pretrained`,
`from_pretrained`, `AutoConfig` and `AutoModel` know it by `model_type = "efficientnet-lite"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from interlace.errors import UserError, suggest


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


# The B0 body of the paper's table 1; Lite changes what is inside a block, not this table.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280  # not scaled in Lite
STRIDE = 32

# width multiplier, depth multiplier, input pixels: the release's own table
VARIANTS = {
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}

# The release normalises (byte - 127) / 128 and resizes with a bicubic filter.
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """
    width (`float`): multiplier of the body's channels, rounded to multiples of 8.
    depth (`float`): multiplier of the repeats of every stage but the first and the last.
    image_size (`int`): side of the square input in pixels. Any size works; the weights were trained on this one.
    hidden_size (`int`): channels of the output grid, those of the head convolution.
    drop_connect_rate (`float`): stochastic depth, 0 at the first block to nearly this rate at the last. The release
        was trained from scratch with 0.2; fine-tuning a few epochs needs none.
    freeze_bn (`bool`): batch normalisation uses its stored statistics in training too and never updates them; scale and
        shift still learn. For fine-tuning: statistics of small batches are noise. Off for training from scratch. It
        also makes training faster, for the normalisation then folds into the convolution.
    """

    model_type = "efficientnet-lite"

    width: float | int = 1.0
    depth: float | int = 1.0
    image_size: int = 224
    num_channels: int = 3
    hidden_size: int = HEAD_CHANNELS
    drop_connect_rate: float | int = 0.0
    freeze_bn: bool = False
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01  # 0.99 in TensorFlow's counting

    @classmethod
    def variant(cls, name: str, **changes) -> EfficientNetLiteConfig:
        """The config of `"lite0"` ... `"lite4"`. Raises UserError for another name."""
        if name not in VARIANTS:
            raise UserError(f"Expected an EfficientNet-Lite variant ({', '.join(VARIANTS)}), got {name!r}."
                            + suggest(name, VARIANTS))
        width, depth, size = VARIANTS[name]
        return cls(**{"width": width, "depth": depth, "image_size": size, **changes})

    def channels(self, base: int) -> int:
        """`base` times the width multiplier, to the nearest multiple of 8 that is not more than 10% below."""
        wanted = base * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded

    def stages(self) -> list[Stage]:
        """The body with both multipliers applied."""
        scaled = [stage._replace(channels=self.channels(stage.channels)) for stage in STAGES]
        return [stage if i in (0, len(scaled) - 1) else stage._replace(repeats=math.ceil(self.depth * stage.repeats))
                for i, stage in enumerate(scaled)]


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, then batch normalisation. (B, C, h, w) to (B, C', h/s, w/s)

    While the statistics stand still (evaluation, or `freeze_bn`) the normalisation is a fixed linear map, so it is
    folded into the convolution's weight on the fly: one pass over the picture instead of two, with gradients.
    """

    def __init__(self, config: EfficientNetLiteConfig, inputs: int, outputs: int, kernel: int, stride: int = 1,
                 groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, config.batch_norm_eps, config.batch_norm_momentum)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.pad(x)
        if self.norm.training:
            return self.norm(F.conv2d(x, self.conv.weight, None, self.stride, padding, 1, self.conv.groups))
        norm: Any = self.norm  # torch types its affine parameters and statistics as optional
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # (C',)
        weight = self.conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, norm.bias - norm.running_mean * scale, self.stride, padding, 1, self.conv.groups)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """TensorFlow splits the padding so that the odd pixel goes right and below. Where that is symmetric the
        convolution pads by itself, which saves a copy of the picture."""
        rows, columns = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[-2:])
        if rows % 2 == 0 and columns % 2 == 0:
            return x, (rows // 2, columns // 2)
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), (0, 0)


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; add the input where shapes allow (MobileNetV2,
    arXiv:1801.04381)."""

    def __init__(self, config: EfficientNetLiteConfig, inputs: int, stage: Stage, stride: int, drop: float):
        super().__init__()
        inner = inputs * stage.expand
        self.expand = ConvNorm(config, inputs, inner, 1) if stage.expand > 1 else None
        self.depthwise = ConvNorm(config, inner, inner, stage.kernel, stride, groups=inner)
        self.project = ConvNorm(config, inner, stage.channels, 1)
        self.residual = stride == 1 and inputs == stage.channels
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = F.relu6(self.depthwise(y), inplace=True)
        y = self.project(y)
        if not self.residual:
            return y
        if self.training and self.drop:
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop
            y = y * kept.to(y.dtype) / (1 - self.drop)
        return x + y


@dataclass
class EfficientNetLiteOutput(ModelOutput):
    """
    last_hidden_state (B, h*w, C): cells of the grid, row by row. pooler_output (B, C): their mean, which the release's
    classifier reads. feature_map (B, C, h, w): the same cells as a picture. h = w = ceil(pixels / 32).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    feature_map: Tensor | None = None


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels (B, 3, H, W), normalised, to a grid of `config.hidden_size` channels."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = False
    _no_split_modules = ["InvertedResidual"]  # noqa: RUF012  accelerate must not cut through a residual

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        stages = config.stages()
        total, channels = sum(stage.repeats for stage in stages), STEM_CHANNELS
        self.stem = ConvNorm(config, config.num_channels, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for stage in stages:
            for repeat in range(stage.repeats):
                drop = config.drop_connect_rate * len(self.blocks) / total
                self.blocks.append(InvertedResidual(config, channels, stage, stage.stride if repeat == 0 else 1, drop))
                channels = stage.channels
        self.head = ConvNorm(config, channels, config.hidden_size, 1)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs
    ) -> EfficientNetLiteOutput | tuple[Tensor | None, ...]:
        # channels_last: oneDNN's depthwise kernels want it on CPU, tensor cores on GPU
        x = pixel_values.to(self.stem.conv.weight.dtype).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
        x = F.relu6(self.stem(x), inplace=True)  # (B, 32, H/2, W/2)
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.head(x), inplace=True)  # (B, C, h, w)
        output = EfficientNetLiteOutput(x.flatten(2).transpose(1, 2), x.mean((2, 3)), x)
        return output.to_tuple() if return_dict is False else output

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """As in torch, except that `config.freeze_bn` keeps every normalisation in evaluation."""
        super().train(mode)
        if self.config.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            statistics = dict(module.named_buffers())
            init.zeros_(statistics["running_mean"])
            init.ones_(statistics["running_var"])
            init.zeros_(statistics["num_batches_tracked"])


# The PyTorch release's names (package efficientnet-lite-pytorch) and ours; {n} counts blocks. None: dropped on purpose.
KEYS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_blocks.{n}._expand_conv": "blocks.{n}.expand.conv",
    "_blocks.{n}._bn0": "blocks.{n}.expand.norm",
    "_blocks.{n}._depthwise_conv": "blocks.{n}.depthwise.conv",
    "_blocks.{n}._bn1": "blocks.{n}.depthwise.norm",
    "_blocks.{n}._project_conv": "blocks.{n}.project.conv",
    "_blocks.{n}._bn2": "blocks.{n}.project.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": None,  # the 1000 classes of ImageNet
}


def from_release(state: Mapping[str, Tensor], config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """The release's state dict under our names. Raises UserError when a key is unknown, missing or of another shape,
    all of them at once."""
    expected = {name: tuple(value.shape) for name, value in _meta_model(config).state_dict().items()}
    table: dict[str, str | None] = {}
    for theirs, ours in KEYS.items():
        for n in range(sum(stage.repeats for stage in config.stages())) if "{n}" in theirs else [0]:
            table[theirs.format(n=n)] = None if ours is None else ours.format(n=n)
    renamed, wrong = {}, []
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if module not in table:
            wrong.append(f"unknown {key}")
        elif (ours := table[module]) is not None:
            if expected.get(f"{ours}.{leaf}") != tuple(value.shape):
                wrong.append(f"{key} {tuple(value.shape)}, expected {expected.get(f'{ours}.{leaf}')}")
            renamed[f"{ours}.{leaf}"] = value.contiguous()
    wrong += [f"missing {name}" for name in expected if name not in renamed]
    if wrong:
        raise UserError("These are not the weights of this EfficientNet-Lite (expected the PyTorch release's names): "
                        + "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
    return renamed


def _meta_model(config: EfficientNetLiteConfig) -> EfficientNetLiteModel:
    with torch.device("meta"):
        return EfficientNetLiteModel(config)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
