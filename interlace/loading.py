"""What a loaded folder lacks: said at once, where transformers goes on with random weights and a table of names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from interlace.errors import UserError, first_line
from interlace.towers import quiet

SHOWN = 6  # names of one sort that an error lists before it counts the rest


class LoadedWhole:
    """Stands before PreTrainedModel among a model's bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but in float32 unless `dtype` says otherwise: a file in half precision is converted.
        Raises UserError where transformers would go on with random weights: tensors that are missing, unknown or of
        another shape, all named together. Given a `config`, heads may be others than those of the file."""
        kwargs.setdefault("dtype", torch.float32)
        theirs = super().from_pretrained  # type: ignore[misc]
        if kwargs.get("output_loading_info") or kwargs.get("ignore_mismatched_sizes"):  # the caller looks for himself
            return theirs(pretrained_model_name_or_path, *args, **kwargs)
        where = str(pretrained_model_name_or_path)
        if Path(where).expanduser().is_absolute() and not Path(where).expanduser().is_dir():
            raise UserError(f"no folder {where}: expected one that save_pretrained wrote.")
        try:
            with quiet():
                model, info = theirs(pretrained_model_name_or_path, *args, **kwargs, output_loading_info=True,
                                     ignore_mismatched_sizes=True)  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where} cannot be loaded: {first_line(error)} Expected a config.json and its "
                            "model.safetensors, whole.") from error  # fmt: skip
        check_loaded(str(pretrained_model_name_or_path), info, len(model.state_dict()), new_heads="config" in kwargs)
        return model


def check_loaded(folder: str, info: dict[str, Any], names: int, new_heads: bool = False) -> None:
    """`info`: transformers' loading info. `names`: how many tensors the model has. `new_heads`: heads may differ from
    those of the file; which ones start anew is printed to stderr.

    Raises UserError that names together every tensor that is missing, unknown, or of another shape.
    """
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if new_heads:
        if fresh := sorted({".".join(name.split(".")[:2]) for name in missing if name.startswith("heads.")}):
            print(f"{folder} has no {', '.join(fresh)}: at their initial values", file=sys.stderr)
        missing, unknown = ([name for name in found if not name.startswith("heads.")] for found in (missing, unknown))
    missing = [name for name in missing if name not in wrong]
    if not (missing or unknown or wrong):
        return
    text = [f"{folder}: the weights do not fit the model its config.json describes."]
    for what, found in (("Missing", missing), ("Unknown", unknown), ("Of another shape", wrong)):
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            text.append(f"{what} ({len(found)}): {', '.join(found[:SHOWN])}{more}.")
    if len(missing) + len(wrong) > names / 2:
        text.append("Is it another model's folder? `interlace convert` brings a release's weights over.")
    else:
        text.append("Copy the folder again, or load it with the version of interlace that wrote it.")
    raise UserError(" ".join(text))
