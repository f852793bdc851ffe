"""A vision tower and a text tower that writes what it reads there, on transformers' own class."""

from interlace.captioner.build import (
    Captioner,
    caption_model,
    caption_model_from_towers,
    is_captioner,
    load_captioner,
    load_decoder,
)
from interlace.captioner.labels import caption_labels, labels_of
from interlace.captioner.model import HIDDEN, TEXT, VISION, CaptionModel, Ids, longest_text

__all__ = ["HIDDEN", "TEXT", "VISION", "CaptionModel", "Captioner", "Ids", "caption_labels", "caption_model",
           "caption_model_from_towers", "is_captioner", "labels_of", "load_captioner", "load_decoder",
           "longest_text"]  # fmt: skip
