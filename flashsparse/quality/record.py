"""`quality.json`: what was measured of a pack, kept in its directory and naming its digest.

It is no file of the manifest: a pack is a function of its source, this is known only after running it. One that names
another digest is of another pack and is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from flashsparse.pack.manifest import canonical_json

NAME = "quality.json"
VERSION = 1
MAX_BYTES = 16 << 20
_NEEDED = ("texts", "window", "layers", "selected_bytes_per_token", "ffn_bytes", "dense_perplexity")
_SHOWN = ("tokens", "perplexity", "recall", "predicted_density")
_COMPARED = ("perplexity_ratio", "kl", "top1_agreement")  # beside `dense_perplexity`
LARGEST = 1e300  # of a figure: larger ones are no floats, or not finite


def write_quality(pack: Path, quality: dict[str, Any]) -> Path:
    """Writes the record of the pack in `pack`; it appears whole or not at all. Raises OSError."""
    path = pack / NAME
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        temporary.write_text(canonical_json({"format": "flashsparse-quality", "version": VERSION} | quality))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def read_quality(pack: Path, digest: str) -> tuple[dict[str, Any] | None, str | None]:
    """(the record, None), (None, why there is none that can be used), or (None, None) when nothing was measured."""
    path = pack / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            return None, f"{NAME} cannot be read: it is larger than {MAX_BYTES} bytes"
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        if found["version"] != VERSION:
            return None, f"{NAME} is of version {found['version']}, this FlashSparse reads {VERSION}"
        if found["pack"] != digest:
            return None, f"{NAME} is of another pack; run `flashsparse eval` again"
        problem = _problem(found)
        return (None, f"{NAME} cannot be read: {problem}") if problem else (found, None)
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{NAME} cannot be read: {type(error).__name__}: {error}"


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _problem(found: dict[str, Any]) -> str | None:
    """What keeps a record from being shown and drawn. Raises KeyError for a figure that is missing."""
    if not all(_is_figure(found[name]) for name in _SHOWN):
        return "a figure is not a number"
    if missing := [name for name in _NEEDED if name not in found]:
        return f"{missing[0]} is missing"
    figures = [found["selected_bytes_per_token"], found["ffn_bytes"]]
    figures += [found[name] for name in ("dense_perplexity", "true_density") if found.get(name) is not None]
    figures += [found[name] for name in _COMPARED if found["dense_perplexity"] is not None]
    return None if all(map(_is_figure, figures)) else "a figure is not a number"


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """The record in two short lines: what is lost, and what is loaded for it."""
    lost = f"perplexity {quality['perplexity']:.4g}"
    if quality.get("dense_perplexity"):
        change = 100 * (quality["perplexity_ratio"] - 1)
        lost += f" ({change:+.2f} % against {quality['dense_perplexity']:.4g} of the dense model)"
        lost += f", KL {quality['kl']:.3g} nats, top-1 agreement {_percent(quality['top1_agreement'])}"
    sets = f"recall {_percent(quality['recall'])}, {_percent(quality['predicted_density'])} of the neurons loaded"
    if quality.get("true_density") is not None:
        sets += f", {_percent(quality['true_density'])} truly active"
    return [lost, f"{sets}; measured on {quality['tokens']} tokens"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
