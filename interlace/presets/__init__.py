"""The published systems, one file each: the paper's figure as segments, the names of its release, a tiny size."""

from interlace.presets import blip, clip, lxmert, uniter, vilbert, vilt, visual_bert, vl_bert  # noqa: F401
