"""The published systems, one file each: the paper's figure as segments, the names of its release, a tiny size."""

from interlace.presets import (  # noqa: F401
    blip,
    clip,
    lxmert,
    uniter,
    vilbert,
    vilt,
    vision_encoder_decoder,
    visual_bert,
    vl_bert,
)
