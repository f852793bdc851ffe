"""interlace: vision-language models whose fusion is one line of a config."""

__version__ = "0.1.0"
