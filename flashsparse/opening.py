"""Opening a pack as one thing: manifest, configuration, headers, tokenizer and file descriptors of the same version.

What stays in memory is read while the libraries are imported and the tokenizer is loaded, which takes seconds.

Packs are replaced by one rename while others read them. What is opened by path at different moments could belong to two
packs, so the manifest is read again at the end, and everything is opened anew when it changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsparse.errors import FlashSparseError, PackError
from flashsparse.flash import FlashFile
from flashsparse.models.tensors import check_resident
from flashsparse.pack.manifest import PREDICTOR, Manifest, read_manifest
from flashsparse.pack.predictor import check_predictor
from flashsparse.pack.safetensors import read_header
from flashsparse.runtime import import_libraries, load_tokenizer

if TYPE_CHECKING:
    from flashsparse.loading import Loading
    from flashsparse.pack.safetensors import Header
    from flashsparse.weights import ResidentStore

ATTEMPTS = 5


@dataclass
class OpenPack:
    """`files[0]` is the resident file, `files[1 + i]` and `headers[1 + i]` belong to layer i; last, when the pack has
    one, comes the predictor file, of which `predictor` is the index. `loading` reads what stays in memory, in `stores`.
    """

    manifest: Manifest
    headers: list[Header] = field(default_factory=list)
    files: list[FlashFile] = field(default_factory=list)
    predictor: int | None = None
    tokenizer: Any = None
    stores: list[ResidentStore] = field(default_factory=list)
    loading: Loading | None = None

    def close(self) -> None:
        """After its reads, which are dropped. Keeps neither the weights nor the read pool."""
        if self.loading is not None:
            self.loading.release()
        self.loading = None
        self.stores.clear()
        for file in self.files:
            file.close()


def open_pack(path: Path, read_mode: str, modules: bool, start: Callable[[OpenPack], None]) -> OpenPack:
    """Open the pack at `path`; imports libraries, with `modules` those of mlx-lm's models.

    `start` is called when the files are open and checked: it may begin `loading`. It is called
    again with another OpenPack when the pack was replaced meanwhile.
    Raises PackError, DamagedPackError, FlashReadError, and what `start` raises.
    """
    for attempt in range(ATTEMPTS):
        manifest = read_manifest(path)
        last = attempt == ATTEMPTS - 1
        try:
            opened = _open(manifest, read_mode, modules, start)
        except FlashSparseError:
            if last or not manifest.replaced():
                raise
            continue
        if not manifest.replaced():
            return opened
        opened.close()
    raise PackError(f"{path}: the pack was replaced {ATTEMPTS} times while it was opened; try again")


def _open(manifest: Manifest, read_mode: str, modules: bool, start: Callable[[OpenPack], None]) -> OpenPack:
    pack = OpenPack(manifest)
    try:
        _open_files(pack, read_mode)
        start(pack)
        import_libraries(manifest.family, modules)
        pack.tokenizer = load_tokenizer(manifest)
        return pack
    except BaseException:
        pack.close()
        raise


def _open_files(pack: OpenPack, read_mode: str) -> None:
    """Open and check every file of records and weights."""
    manifest, layers = pack.manifest, range(pack.manifest.layers)
    manifest.check_sizes()
    predictor = len(layers) + 1 if PREDICTOR in manifest.files else None
    paths = [manifest.resident_path, *map(manifest.flash_path, layers)]
    for path in paths if predictor is None else [*paths, manifest.predictor_path]:
        pack.files.append(FlashFile(path, read_mode))
    pack.headers = [read_header(manifest.resident_path, error=PackError), *map(manifest.flash_header, layers)]
    check_resident(manifest, pack.headers[0])
    if predictor is not None:
        pack.headers.append(read_header(manifest.predictor_path, error=PackError))
        check_predictor(manifest, pack.headers[predictor])
    pack.predictor = predictor
