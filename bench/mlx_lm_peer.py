"""mlx-lm on given tokens, timed: one of the peers' processes. `python -m bench.mlx_lm_peer CHECKPOINT --tokens 8`.

The whole model is in memory; mlx-lm's Llama computes SwiGLU whatever the configuration says, at the same cost. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop decoding after so long")
    args = parser.parse_args()
    print(json.dumps(run(args)))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, evaluate the prompt at once, then the other tokens one by one."""
    import importlib.metadata

    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    tokens = json.loads((args.checkpoint / "tokens.json").read_text())["tokens"][: args.prompt + args.tokens]
    began = time.perf_counter()
    model = load_model(args.checkpoint)[0]
    load_s = time.perf_counter() - began
    cache = make_prompt_cache(model)

    def evaluate(ids: list[int]) -> float:
        began = time.perf_counter()
        mx.eval(model(mx.array([ids]), cache=cache))
        return time.perf_counter() - began

    prefill_s = evaluate(tokens[: args.prompt])
    steps: list[float] = []
    for token in tokens[args.prompt :]:
        steps.append(evaluate([token]))
        if sum(steps) > args.seconds:
            break
    return {
        "decode_tps": len(steps) / sum(steps) if steps else None,
        "prefill_tps": args.prompt / prefill_s,
        "load_s": load_s,
        "tokens": len(steps),
        "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")),
    }


if __name__ == "__main__":
    sys.exit(main())
