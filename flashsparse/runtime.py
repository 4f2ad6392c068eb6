"""What the engine borrows from mlx-lm, imported late and without its side effects on the process.

mlx-lm lowers the limit of open files when it is imported, and an unprivileged process cannot raise it again.
"""

from __future__ import annotations

import functools
import importlib
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


def import_libraries(family: str, modules: bool) -> None:
    """Import MLX, mlx-lm (1 to 2 s) and our own parts; with `modules` the family's mlx-lm model too, and run a token.

    Afterwards libraries are loaded and their code is in memory, so that what follows is the engine's own footprint.
    """
    with _import_lock, _process_untouched():
        import flashsparse.assembly
        import flashsparse.cache
        import flashsparse.kvcache
        import flashsparse.models.native_decoder
        import flashsparse.session
        import flashsparse.weights  # noqa: F401

        if modules:
            importlib.import_module(f"flashsparse.models.{family}")
            _run_tiny_model()
        _run_sampler()
        _run_bookkeeping()


@functools.cache
def _run_tiny_model() -> None:
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs("llama", 32, 1, 32, 2, 1e-5, 32))
    for count in (3, 1):
        mx.eval(model(mx.zeros((1, count), mx.int32)))


@functools.cache
def _run_sampler() -> None:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    logits = mx.arange(32.0)[None]
    mx.eval(make_sampler(temp=1.0, top_p=0.9)(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))


@functools.cache
def _run_bookkeeping() -> None:
    """What a step does in numpy, once: its loops are spread over a megabyte of numpy's code."""
    import numpy as np

    from flashsparse.cache import SlotTable
    from flashsparse.weights import Buffer

    table = SlotTable(64, 16)
    for first in range(0, 48, 4):
        for round_ in table.rounds(np.arange(first, first + 12, dtype=np.int32)):
            table.set_begin(round_.slots, round_.slots.astype(np.int64) * 2 + table.begin[round_.slots])
            round_.commit()
        table.end_token()
    ids = np.flatnonzero(np.arange(64, dtype=np.float32) % 3 != 0).astype(np.int32)
    np.split(ids, np.flatnonzero(np.diff(ids) * 64 > 100) + 1)
    np.clip(np.minimum(ids.astype(np.int64) // 4 * 4, 32), 0, 16).sum()
    np.searchsorted(ids, 5), np.sort(ids)[::-1], int(ids.min()) + int(ids.max()), bool((ids < 0).any())
    values = np.ones((2, 64), np.float32)
    values += values.astype(np.float16)
    np.ascontiguousarray(values.reshape(-1, 2, 4)).argmax()
    Buffer(1).bytes[:] = 0


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
