"""What transformers says about the embedded demo model: greedy continuations and bits per byte, in float32.

    python tests/reference/make_demo_vectors.py [--model DIR] [--out FILE]

Writes tests/vectors/demo.json. Run it again whenever flashsparse/demo_model changes; the digest in it says for which
weights it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("Once upon a time", "The old sailor looked at the sea and said,", "Tom and Lily went to the park. They")
GREEDY_TOKENS = 200
# Written for this test; the model has not seen it.
TEXT = """\
Once there was a miller who lived by a slow green river. Every morning he opened the gate, and the
water pushed the great wheel around, and the wheel turned the stone, and the stone ground the corn.
One day the wheel stood still. The miller looked at the water, but the water was there. He looked at
the stone, but the stone was whole. Then he heard a small voice from under the wheel. "Please do not
be angry," it said. "I am only an otter, and I have built my house here."

The miller sat down on the grass and thought about it for a long time. "I need my wheel," he said at
last, "and you need your house. But the river is wide, and there is a better place on the other
side, under the roots of the old willow." So the two of them carried the sticks across the river,
one after another, until the sun went down. In the evening the wheel turned again, and the otter had
the best house on the river. From that day on there was a fresh fish on the miller's step every
Sunday morning, and he never had to ask who had put it there.
"""


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The continuation, and for each step how far the two best logits are apart, as a share of the largest."""
    step, tokens, margins = model(torch.tensor([prompt]), use_cache=True), [], []
    for _ in range(GREEDY_TOKENS):
        row = step.logits[0, -1]
        best = row.topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float((best.values[0] - best.values[1]) / row.abs().max()), 7))
        step = model(best.indices[:1][None], past_key_values=step.past_key_values, use_cache=True)
    return tokens, margins


@torch.no_grad()
def bits_per_byte(model: Any, tokens: list[int], size: int) -> float:
    """Of the text of `size` bytes that `tokens` spell; the first token is given."""
    ids = torch.tensor([tokens])
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
    return float(loss) / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "flashsparse" / "demo_model")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "vectors" / "demo.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens, margins = greedy(model, ids)
        cases.append({"prompt": prompt, "prompt_tokens": ids, "greedy": tokens, "margins": margins})
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: model.config.max_position_embeddings]
    size = len(tokenizer.decode(text).encode())
    record = {
        "weights_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "cases": cases,
        "text_tokens": text,
        "text_bytes": size,
        "bits_per_byte": bits_per_byte(model, text, size),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.out.write_text(json.dumps(record, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
