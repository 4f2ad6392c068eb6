"""Packs of a synthetic checkpoint for the other benchmarks: `python -m bench.packs CHECKPOINT OUT --kind predict-16`.

Gives the checkpoint a tokenizer whose words are ids and its planted sequence as text, converts it, and leaves the
sequence beside the pack as `<pack>.tokens.json`, so that the checkpoint may be deleted. Thresholds are calibrated on
the end of the sequence, benchmarks feed its beginning; without calibration (`--calibrate-tokens 0`, quick) they are
where the activation's zeros begin.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench.synthetic import load_fixture

KINDS: dict[str, dict[str, Any]] = {
    f"{tier}-{bits}": {"tier": tier, "bits": bits} for tier in ("predict", "exact", "dense") for bits in (16, 4)
} | {f"compact-{bits}": {"tier": "exact", "gate": "compact", "bits": bits} for bits in (16, 4)}
CALIBRATED = 512  # tokens at the end of the sequence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="the packs become OUT-KIND")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), required=True, help="may be repeated")
    parser.add_argument("--calibrate-tokens", type=int, default=CALIBRATED)
    args = parser.parse_args()
    for kind in args.kind:
        began = time.monotonic()
        pack = make_pack(args.checkpoint, Path(f"{args.out}-{kind}"), kind, args.calibrate_tokens)
        size = sum(path.stat().st_size for path in pack.iterdir())
        print(json.dumps({"pack": str(pack), "bytes": size, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return 0


def make_pack(checkpoint: Path, pack: Path, kind: str, calibrate_tokens: int = CALIBRATED) -> Path:
    """Convert to `pack` (done at once when it is complete); its token sequence goes to `sequence_path(pack)`."""
    from converter.convert import convert

    options = dict(KINDS[kind])
    if options["tier"] == "predict" and calibrate_tokens:
        text = add_words(checkpoint, calibrate_tokens)
        tokens = min(calibrate_tokens, len(load_fixture(checkpoint).tokens))
        options |= {"calibrate": [text], "calibrate_tokens": tokens, "calibrate_window": tokens}
    convert(checkpoint, pack, resume=True, **options)
    shutil.copyfile(checkpoint / "tokens.json", sequence_path(pack))
    return pack


def sequence_path(pack: Path) -> Path:
    """Where the token sequence of a pack lies."""
    return pack.with_name(pack.name + ".tokens.json")


def add_words(checkpoint: Path, count: int) -> Path:
    """A tokenizer whose words are token numbers, and the last `count` tokens of the sequence as a text for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(vocab)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not (checkpoint / "tokenizer.json").exists():
        tokenizer.save(str(checkpoint / "tokenizer.json"))
    text = checkpoint.with_name(checkpoint.name + ".txt")
    text.write_text("\n".join(map(str, load_fixture(checkpoint).tokens[-count:])) + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
