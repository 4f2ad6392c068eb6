"""What the engine borrows from mlx-lm, imported late and without its side effects on the process.

mlx-lm lowers the limit of open files when it is imported, and an unprivileged process cannot raise it again.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flashsparse.errors import PackError

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_import_lock = threading.Lock()


@contextmanager
def _process_untouched() -> Iterator[None]:
    """Hold `resource.setrlimit` harmless and put environment variables back."""
    environment, setrlimit = dict(os.environ), resource.setrlimit
    resource.setrlimit = lambda *args: None
    try:
        yield
    finally:
        resource.setrlimit = setrlimit
        for name in set(os.environ) - set(environment):
            del os.environ[name]


def import_mlx_lm() -> None:
    """Import MLX and mlx-lm (1 to 2 s) and start MLX's worker, so that what follows is the engine's own memory."""
    with _import_lock, _process_untouched():
        import mlx.core as mx
        import mlx_lm.models.llama
        import mlx_lm.sample_utils  # noqa: F401

        mx.eval(mx.zeros((1,)) + 1)


def load_tokenizer(manifest: Manifest) -> Any:
    """mlx-lm's tokenizer wrapper for the pack, or None when the pack has no tokenizer.

    Code in a checkpoint is never run: packs hold none and transformers is not told to trust any.
    """
    if not any(name in manifest.files for name in TOKENIZER_FILES):
        return None
    from mlx_lm.tokenizer_utils import load

    stated = manifest.config.get("eos_token_id")
    try:
        return load(manifest.path, eos_token_ids=stated)
    except Exception as error:
        raise PackError(
            f"{manifest.path}: the tokenizer cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the source's tokenizer files and convert again"
        ) from error
