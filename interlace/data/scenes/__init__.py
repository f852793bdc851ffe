"""Teaching scenes: real pictures side by side, with words that say what stands where."""

from interlace.data.scenes.draw import PLACES, Scene, Thing
from interlace.data.scenes.write import Made, make_scenes, parse_cells, parse_per_split

__all__ = ["PLACES", "Made", "Scene", "Thing", "make_scenes", "parse_cells", "parse_per_split"]
