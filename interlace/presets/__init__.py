"""The published systems, one file each: the paper's figure as segments, the names of its release, a tiny size."""

from interlace.presets import clip, lxmert, uniter, vilt, visual_bert  # noqa: F401
