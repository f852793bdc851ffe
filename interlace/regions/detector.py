"""Any object detector of transformers as the source of regions: DETR and its kin, RT-DETR, YOLOS, ...

They have no pooled region features. What stands for one is the last hidden state of the query that found the box: it
is what the detector's own heads read class and box from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from interlace.errors import UserError
from interlace.regions.arrays import RegionArrays
from interlace.regions.base import fingerprint
from interlace.regions.grid import digest
from interlace.towers import quiet


class DetectorExtractor:
    """`folder`: what `save_pretrained` wrote, image processor included. `regions`: the surest so many of its queries.
    `size`: side in pixels in place of the processor's own (its shortest edge, where it keeps the shape).

    Features are (I, D) states of the decoder, `beliefs` (I, 1 + classes), 0 = nothing. `objects` counts classes from 0.
    Raises UserError for a folder that holds no such detector, or one whose outputs are laid out in another way.
    """

    def __init__(self, folder: str | Path, regions: int = 36, size: int | None = None, device: str | None = None):
        self.folder = Path(folder).expanduser()
        if not (self.folder / "config.json").is_file():
            raise UserError(f"Expected a detector's folder as save_pretrained writes it, but {self.folder} has no "
                            "config.json.")  # fmt: skip
        if regions < 1 or (size is not None and size < 1):
            raise UserError(f"expected at least 1 region and 1 pixel; got {regions} regions, size {size}.")
        self.regions, self.size = regions, size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            with quiet():
                loaded = AutoModelForObjectDetection.from_pretrained(self.folder, local_files_only=True,
                                                                     output_loading_info=True)  # fmt: skip
        except ImportError as error:
            raise UserError(f"The detector in {self.folder} needs a package: {_first(error)}") from error
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"Could not load an object detector from {self.folder}: {_first(error)}") from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"The weights in {self.folder} leave {len(missing)} parts of the detector unfilled "
                            f"({', '.join(missing[:3])}, ...): is it the backbone alone?")  # fmt: skip
        self.model = model.eval().to(self.device)
        self.classes = int(model.config.num_labels)
        try:
            with quiet():
                self.processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"No image processor for the detector in {self.folder}: {_first(error)} Copy its "
                            "preprocessor_config.json there.") from error  # fmt: skip
        pixels = json.loads(self.processor.to_json_string())
        settings = {name: pixels.get(name) for name in ("size", "image_mean", "image_std", "resample", "rescale_factor",
                                                        "do_normalize")}  # fmt: skip
        settings["size"] = self._size(pixels.get("size") or {})
        self.options = {"size": settings["size"], "do_pad": False}
        self.hint = max(1, *(int(side) for name, side in settings["size"].items() if name != "longest_edge"), 1)
        self.facts: dict[str, Any] = {
            "kind": "detector", "name": str(folder), "detector": model.config.model_type, "weights": digest(model),
            "regions": regions, "pixels": settings, "asked_size": size,
            "classes": [str(model.config.id2label[n]) for n in range(self.classes)]}  # fmt: skip
        probe = self([Image.new("RGB", (64, 48), "grey")])[0]  # its outputs are looked at before the first picture
        self.features_size, self.beliefs_size = probe.features.shape[1], self.classes + 1

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.facts)

    def _size(self, own: dict[str, int]) -> dict[str, int]:
        if self.size is None:
            return own
        if "shortest_edge" in own:
            longest = round(own.get("longest_edge", own["shortest_edge"]) * self.size / own["shortest_edge"])
            return {"shortest_edge": self.size, "longest_edge": longest}
        return {"height": self.size, "width": self.size}

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[RegionArrays]:
        shapes: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for n, picture in enumerate(pictures):
            pixels = self.processor(images=[picture], return_tensors="pt", **self.options)["pixel_values"][0]
            shapes.setdefault(tuple(pixels.shape), []).append((n, pixels))
        found: dict[int, RegionArrays] = {}
        for same in shapes.values():  # of one shape: nothing is padded, so boxes are parts of the picture itself
            output = self.model(pixel_values=torch.stack([pixels for _, pixels in same]).to(self.device))
            for (n, _), regions in zip(same, self._read(output)):
                found[n] = regions
        return [found[n] for n in range(len(pictures))]

    def _read(self, output: Any) -> list[RegionArrays]:
        logits, boxes, states = (cast(Tensor | None, getattr(output, name, None))
                                 for name in ("logits", "pred_boxes", "last_hidden_state"))  # fmt: skip
        if logits is None or boxes is None or states is None or states.shape[1] < logits.shape[1]:
            raise UserError(f"The detector in {self.folder} ({self.model.config.model_type}) does not give a state for "
                            "each of its boxes; expected one like DETR, RT-DETR or YOLOS.")  # fmt: skip
        states = states[:, -logits.shape[1] :]  # (B, Q, D); YOLOS' queries come after its patches
        beliefs = self._beliefs(logits)
        confidence, objects = beliefs[..., 1:].max(-1)  # (B, Q)
        middle, half = boxes[..., :2], boxes[..., 2:] / 2
        corners = torch.cat([middle - half, middle + half], -1).clamp(0, 1)
        empty = (corners[..., 2:] <= corners[..., :2]).any(-1)  # wholly outside the picture
        surest = confidence.masked_fill(empty, -1).topk(min(self.regions, logits.shape[1])).indices  # (B, I)
        out = []
        for n in range(len(logits)):
            which = surest[n][~empty[n][surest[n]]]
            arrays = (x[n][which].float().cpu().numpy() for x in (states, corners, confidence, beliefs))
            features, box, sure, belief = arrays
            label = objects[n][which].cpu().numpy().astype(np.int32)
            out.append(RegionArrays(features, box, sure, belief, label, sure))
        return out

    def _beliefs(self, logits: Tensor) -> Tensor:
        """(B, Q, L) -> a distribution (B, Q, 1 + classes) whose class 0 is "nothing".

        DETR's softmax has "nothing" as its last class. Those with a sigmoid per class (L = classes) say no such thing:
        what the classes leave of 1 is "nothing", and where they sum to more they are scaled to 1.
        """
        if logits.shape[-1] == self.classes + 1:
            return logits.float().softmax(-1).roll(1, -1)
        if logits.shape[-1] != self.classes:
            raise UserError(f"The detector in {self.folder} has {logits.shape[-1]} logits for {self.classes} classes; "
                            "expected as many, or one more for no object.")  # fmt: skip
        each = logits.float().sigmoid()
        total = each.sum(-1, keepdim=True)
        return torch.cat([(1 - total).clamp(min=0), each / total.clamp(min=1)], -1)


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
