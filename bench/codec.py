"""Lossless compression of records: `python -m bench.codec PACK...`: ratio, speed, and the drives on which it pays.

A record is read and decompressed, or read whole; nothing hides the decompressing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flashsparse.codec_outlook import sample_codec
from flashsparse.machine import known_curve
from flashsparse.pack.manifest import Manifest

THREADS = (1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, nargs="+")
    found = []
    for pack in parser.parse_args().packs:
        manifest, curve = Manifest.load(pack), known_curve(pack)
        for threads in THREADS:
            sample = sample_codec(manifest, threads)
            if sample is None:
                print(f"{pack.name}: records are not 16-bit floats", file=sys.stderr)
                break
            gain = None if curve is None else sample.gain(curve)
            here = "no curve of this drive" if gain is None else f"{gain:.2f} times as fast on this drive"
            print(
                f"{pack.name}  {manifest.source_dtype}, {sample.record_bytes} bytes, {threads} threads: "
                f"{sample.ratio:.2f} to 1, compressed at {sample.encode_rate / 1e9:.2f} GB/s, decompressed at "
                f"{sample.decode_rate / 1e9:.2f} GB/s, pays below {sample.pays_below / 1e9:.2f} GB/s, {here}",
                flush=True,
            )
            row = {"pack": pack.name, "dtype": manifest.source_dtype, "threads": threads, "gain": gain}
            found.append(row | sample.to_dict())
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
