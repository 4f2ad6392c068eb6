"""transformers with accelerate's disk offload on given tokens, timed: one of the peers' processes.

    python -m bench.offload CHECKPOINT --cpu-memory 5GB --prompt 16 --tokens 4

Layers that do not fit into `--cpu-memory` stay in the checkpoint's files and are read for each token. Imports nothing
of flashsparse, so that it may run in another Python environment (the `peers` extra). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cpu-memory", default="5GB", help="weights kept in memory: bytes, or with a unit")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop decoding after so long")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, folder)))
    return 0


def run(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Load with a device map over memory and disk, evaluate the prompt, then the other tokens one by one."""
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    tokens = json.loads((args.checkpoint / "tokens.json").read_text())["tokens"][: args.prompt + args.tokens]
    held = int(args.cpu_memory) if args.cpu_memory.isdigit() else args.cpu_memory  # accelerate wants bytes as a number
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype="auto", device_map="auto", max_memory={"cpu": held}, offload_folder=folder
    )
    load_s = time.perf_counter() - began
    with torch.inference_mode():
        began = time.perf_counter()
        cache = model(torch.tensor([tokens[: args.prompt]]), use_cache=True).past_key_values
        prefill_s = time.perf_counter() - began
        steps: list[float] = []
        for token in tokens[args.prompt :]:
            began = time.perf_counter()
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
            steps.append(time.perf_counter() - began)
            if sum(steps) > args.seconds:
                break
    return {
        "decode_tps": len(steps) / sum(steps) if steps else None,
        "prefill_tps": args.prompt / prefill_s,
        "load_s": load_s,
        "tokens": len(steps),
        "on_disk": sum(place == "disk" for place in getattr(model, "hf_device_map", {}).values()),
        "version": f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, "
        f"torch {torch.__version__}",
    }


if __name__ == "__main__":
    sys.exit(main())
