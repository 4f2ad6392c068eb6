"""Offline conversion of Hugging Face checkpoints to packs. Only the commands that convert import it."""
