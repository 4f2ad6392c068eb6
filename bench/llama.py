"""llama.cpp on given tokens, timed: `python -m bench.llama MODEL.gguf --prompt 128 --tokens 256`; the peer's process.

Through llama-cpp-python's low-level interface (the `peers` extra), which is llama.cpp's own C interface. Imports
nothing of flashsparse, so that it may run in another Python environment. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--sequence", type=Path, help="tokens to feed, as bench.packs leaves them  [default: 1, 2, 3, ...]"
    )
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-repack", action="store_true", help="leave the weights in the file's layout")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop decoding after so long")
    args = parser.parse_args()
    print(json.dumps(run(args)))
    return 0


def start() -> Any:
    """llama-cpp-python's bindings with every CPU backend registered."""
    import llama_cpp.llama_cpp as llama

    folder = Path(llama.__file__).parent / "lib"
    if list(folder.glob("libggml-cpu-*.so")):  # a build with one library per instruction set finds them by folder
        import ctypes

        library = ctypes.CDLL(str(folder / "libggml.so"))
        library.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        library.ggml_backend_load_all_from_path(str(folder).encode())
    llama.llama_backend_init()
    return llama


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, evaluate the prompt in one batch, then the other tokens one by one."""
    llama = start()
    tokens = list(range(1, args.prompt + args.tokens + 1))
    if args.sequence is not None:
        tokens = json.loads(args.sequence.read_text())["tokens"][: args.prompt + args.tokens]
    began = time.perf_counter()
    model = llama.llama_model_load_from_file(str(args.model).encode(), _model_parameters(llama, args))
    context = llama.llama_init_from_model(model, _context_parameters(llama, args)) if model else None
    if not context:
        sys.exit(f"llama.cpp cannot load {args.model}")
    load_s = time.perf_counter() - began
    prefill_s = _evaluate(llama, context, tokens[: args.prompt])
    steps: list[float] = []
    for token in tokens[args.prompt :]:
        steps.append(_evaluate(llama, context, [token]))
        if sum(steps) > args.seconds:
            break
    info = llama.llama_print_system_info().decode()
    return {
        "decode_tps": len(steps) / sum(steps) if steps else None,
        "prefill_tps": args.prompt / prefill_s,
        "load_s": load_s,
        "tokens": len(steps),
        "threads": args.threads,
        "repack": not args.no_repack,
        "system": " ".join(info.split()),
        "version": _version(),
    }


def _model_parameters(llama: Any, args: argparse.Namespace) -> Any:
    parameters = llama.llama_model_default_params()
    parameters.use_extra_bufts = not args.no_repack
    return parameters


def _context_parameters(llama: Any, args: argparse.Namespace) -> Any:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = args.prompt + args.tokens
    parameters.n_batch = parameters.n_ubatch = max(32, min(512, args.prompt))
    parameters.n_threads = parameters.n_threads_batch = args.threads
    return parameters


def _evaluate(llama: Any, context: Any, tokens: list[int]) -> float:
    """Seconds that the tokens took."""
    began = time.perf_counter()
    for first in range(0, len(tokens), 512):
        part = tokens[first : first + 512]
        held = (llama.llama_token * len(part))(*part)  # the batch only points to it
        batch = llama.llama_batch_get_one(held, len(part))
        if failed := llama.llama_decode(context, batch):
            sys.exit(f"llama.cpp: llama_decode gave {failed}")
    llama.llama_get_logits(context)
    return time.perf_counter() - began


def _version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"


if __name__ == "__main__":
    sys.exit(main())
