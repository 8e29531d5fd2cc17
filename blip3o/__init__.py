"""BLIP3-o written from scratch: a language model that understands images, and draws what it reads."""

__version__ = "0.1.0"
