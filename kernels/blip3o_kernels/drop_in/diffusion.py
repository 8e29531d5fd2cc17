"""diffusers' transformers."""
from .swap import Part
PARTS: dict[str, Part] = {}
