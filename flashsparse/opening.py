"""Opening a pack as one thing: manifest, configuration, headers, tokenizer and file descriptors of the same version.

Packs are replaced by one rename while others read them. What is opened by path at different moments could belong to two
packs, so the manifest is read again at the end, and everything is opened anew when it changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsparse.errors import FlashSparseError, PackError
from flashsparse.flash import FlashFile
from flashsparse.models.tensors import check_resident
from flashsparse.pack.manifest import PREDICTOR, Manifest, read_manifest
from flashsparse.pack.predictor import check_predictor
from flashsparse.pack.safetensors import read_header
from flashsparse.runtime import import_mlx_lm, load_tokenizer

if TYPE_CHECKING:
    from flashsparse.pack.safetensors import Header

ATTEMPTS = 5


@dataclass(frozen=True)
class OpenPack:
    """`files[0]` is the resident file, `files[1 + i]` and `headers[1 + i]` belong to layer i; last, when the pack has
    one, comes the predictor file, of which `predictor` is the index."""

    manifest: Manifest
    tokenizer: Any
    headers: list[Header]
    files: list[FlashFile]
    predictor: int | None = None

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_pack(path: Path, read_mode: str) -> OpenPack:
    """Open the pack at `path`; imports MLX. Raises PackError, DamagedPackError, FlashReadError."""
    for attempt in range(ATTEMPTS):
        manifest = read_manifest(path)
        last = attempt == ATTEMPTS - 1
        try:
            opened = _open(manifest, read_mode)
        except FlashSparseError:
            if last or not manifest.replaced():
                raise
            continue
        if not manifest.replaced():
            return opened
        opened.close()
    raise PackError(f"{path}: the pack was replaced {ATTEMPTS} times while it was opened; try again")


def _open(manifest: Manifest, read_mode: str) -> OpenPack:
    files: list[FlashFile] = []
    try:
        manifest.check_sizes()
        layers = range(manifest.layers)
        predictor = len(layers) + 1 if PREDICTOR in manifest.files else None
        paths = [manifest.resident_path, *map(manifest.flash_path, layers)]
        for path in paths if predictor is None else [*paths, manifest.predictor_path]:
            files.append(FlashFile(path, read_mode))
        headers = [read_header(manifest.resident_path, error=PackError), *map(manifest.flash_header, layers)]
        check_resident(manifest, headers[0])
        if predictor is not None:
            headers.append(read_header(manifest.predictor_path, error=PackError))
            check_predictor(manifest, headers[predictor])
        import_mlx_lm(manifest.family)
        return OpenPack(manifest, load_tokenizer(manifest), headers, files, predictor)
    except BaseException:
        for file in files:
            file.close()
        raise
