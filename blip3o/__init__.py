"""BLIP3-o written from scratch: a language model that understands images, and draws what it reads.

Blip3o      the networks, and their weights' files
Pipeline    the released system in use: chat, pictures from prompts, pictures again
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip3o.model import Blip3o
    from blip3o.pipeline import Pipeline

__all__ = ["Blip3o", "Pipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Both are loaded when they are asked for: torch takes seconds."""
    if name == "Blip3o":
        from blip3o.model import Blip3o

        return Blip3o
    if name == "Pipeline":
        from blip3o.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
