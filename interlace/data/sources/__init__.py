"""One small file per format; `open_source` looks at what is there and picks the reader."""

from interlace.data.sources.open import open_source as open_source
