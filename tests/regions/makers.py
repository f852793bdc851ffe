"""Small real things to extract from: tiny towers and detectors with random weights, photographs with known parts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from interlace.regions import RegionArrays


def write_vit(folder: Path, width: int = 16, size: int = 32) -> Path:
    """A ViT of 4 x 4 cells with random weights."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=width,
                       image_size=size, patch_size=size // 4)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_yolos(folder: Path, queries: int = 9) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         image_size=[32, 48], patch_size=16, num_detection_tokens=queries, num_labels=5,
                         initializer_range=0.5)  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def write_detr(folder: Path, queries: int = 7) -> Path:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                            out_features=["stage4"])  # fmt: skip
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                        d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=queries, num_labels=5,
                        init_std=0.5)  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def write_rt_detr(folder: Path, queries: int = 6) -> Path:
    """One whose classes have a sigmoid each."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                                  layer_type="basic", out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = RTDetrConfig(backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
                          encoder_ffn_dim=16, d_model=16, num_queries=queries, decoder_in_channels=[16, 16, 16],
                          decoder_ffn_dim=16, num_denoising=0, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, num_labels=5, anchor_image_size=None)  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, and different everywhere: the colour of a part says where it is."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_photographs(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """pairs.csv and p0.png, p1.png, ... of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "image", "caption"])
        for n, size in enumerate(sizes):
            photograph(*size, seed=n).save(folder / f"p{n}.png")
            out.writerow([f"row{n}", f"p{n}.png", f"photograph {n}"])
    return folder


def some_regions(count: int = 3, features: int = 8, seed: int = 0, **more: np.ndarray) -> RegionArrays:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), axis=1)  # (I, corner, axis)
    return RegionArrays(rng.standard_normal((count, features)).astype(np.float32),
                        corners.reshape(count, 4).astype(np.float32), **more)  # fmt: skip


def full_regions(count: int = 3, features: int = 8, classes: int = 5, seed: int = 0) -> RegionArrays:
    """With beliefs, objects and attributes."""
    rng = np.random.default_rng(seed + 100)
    beliefs = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    half = np.full(count, 0.5, np.float32)
    return some_regions(count, features, seed, confidence=beliefs[:, 1:].max(1), beliefs=beliefs,
                        objects=beliefs[:, 1:].argmax(1), objects_confidence=half,
                        attributes=rng.integers(0, 4, count), attributes_confidence=half)  # fmt: skip
