"""Offline conversion of Hugging Face checkpoints to packs. Only the commands that convert import it."""

from converter.convert import convert

__all__ = ["convert"]
