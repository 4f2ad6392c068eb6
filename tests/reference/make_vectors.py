"""Makes the reference vectors with torch and transformers: tiny checkpoints, their logits, what produced them.

    python tests/reference/make_vectors.py [--out DIR] [--seeds DIR] [CASE ...]

Each case becomes DIR/CASE/ (an ordinary checkpoint directory), DIR/CASE.npz (tokens, float32 logits, greedy tokens)
and DIR/CASE.json (seed, versions, conversion options). Comparing vectors is tests/reference/test_fresh_vectors.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import CASES, DECODE_TOKENS, GREEDY_TOKENS, PROMPT_TOKENS, Case, config_fields
from torch import nn

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
}
# Two best logits closer than this share of the largest would make greedy equality a matter of rounding.
MIN_MARGIN = 1e-3


class FatRelu(nn.Module):
    """x where x >= threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= self.threshold, x, torch.zeros_like(x))


class DoubleReluMlp(nn.Module):
    """relu(gate) * relu(up), then down: the FFN of Bamboo and TurboSparse, around the layer's own linears."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * torch.relu(self.up_proj(x)))


def build(case: Case, seed: int) -> Any:
    """The float32 model of a case with weights drawn by numpy from `seed`, so that they do not depend on torch."""
    config_class, model_class = CLASSES[case.family]
    config = config_class(**config_fields(case))
    config._attn_implementation = "eager"
    model = model_class(config).eval().to(torch.float32)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(draw(rng, name, tuple(parameter.shape))))
    for layer in getattr(model.model, "layers", []):
        if case.activation == "fatrelu":
            layer.mlp.act_fn = FatRelu(float(case.param or 0.0))
        elif case.activation == "drelu":
            layer.mlp = DoubleReluMlp(layer.mlp)
    return model


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of one tensor: matrices keep the scale of what passes through, norms stay near one."""
    noise = rng.standard_normal(shape)
    if name.endswith(".bias"):
        return (0.1 * noise).astype(np.float32)
    if len(shape) == 1:
        return (1.0 + 0.1 * noise).astype(np.float32)
    # Attention a little sharper than unit scale: then positions, windows and rope matter to the logits.
    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
    return (gain * noise / np.sqrt(shape[1])).astype(np.float32)


@torch.no_grad()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [len(tokens), vocab]: the prompt at once, then one token at a time through the KV cache."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    step = model(ids[:, :PROMPT_TOKENS], use_cache=True)
    rows = [step.logits[0]]
    for position in range(PROMPT_TOKENS, ids.shape[1]):
        step = model(ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
        rows.append(step.logits[0])
    return torch.cat(rows).numpy()


@torch.no_grad()
def greedy_of(model: Any, prompt: np.ndarray) -> np.ndarray:
    """The greedy continuation of `prompt`, GREEDY_TOKENS tokens."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    step, out = model(ids, use_cache=True), []
    for _ in range(GREEDY_TOKENS):
        token = step.logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(token))
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
    return np.asarray(out, dtype=np.int32)


def margin(logits: np.ndarray) -> float:
    """Smallest distance between the two best logits of a row, as a share of the largest absolute logit."""
    best = np.sort(logits, axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).min() / np.abs(logits).max())


def written_config(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    """config.json as a checkpoint of that style and family states it."""
    if case.style == 4 and (rope := config.pop("rope_parameters", None)):
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        # Linear scaling predates the key `rope_type`.
        key = "type" if kind == "linear" else "rope_type"
        config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
        config.pop("layer_types", None)
        config["torch_dtype"] = config.pop("dtype", "float32")
        config["transformers_version"] = "4.46.0"
    return config | case.published


def make(case: Case, out: Path, seeds: Path | None) -> None:
    """Writes one case; its seed is the one recorded in `seeds`, or the first whose greedy tokens are well separated."""
    first = 1000 * (1 + [c.name for c in CASES].index(case.name))
    if seeds is not None:
        first = json.loads((seeds / f"{case.name}.json").read_text())["seed"]
    for seed in range(first, first + 1000):
        model = build(case, seed)
        tokens = np.random.default_rng(seed + 1).integers(0, model.config.vocab_size, PROMPT_TOKENS + DECODE_TOKENS)
        logits = logits_of(model, tokens)
        greedy = greedy_of(model, tokens[:PROMPT_TOKENS])
        continued = logits_of(model, np.concatenate([tokens[:PROMPT_TOKENS], greedy]))
        if seeds is not None or min(margin(logits), margin(continued)) > MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{case.name}: no seed in {first}..{first + 999} separates the two best logits")
    save(case, model, out, {"seed": seed, "margin": round(margin(logits), 6)}, tokens, logits, greedy)
    print(
        f"{case.name}: seed {seed}, largest logit {np.abs(logits).max():.2f}, margin {margin(logits):.4f}", flush=True
    )


def save(
    case: Case, model: Any, out: Path, facts: dict[str, Any], tokens: np.ndarray, logits: np.ndarray, greedy: np.ndarray
) -> None:
    """Writes the checkpoint directory, the arrays and the record of how they were made."""
    folder = out / case.name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(written_config(case, json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")
    np.savez_compressed(out / f"{case.name}.npz", tokens=tokens.astype(np.int32), logits=logits, greedy=greedy)
    record = facts | {
        "family": case.family,
        "activation": case.activation,
        "param": case.param,
        "convert_activation": case.override,
        "prompt_tokens": PROMPT_TOKENS,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
    (out / f"{case.name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "vectors")
    parser.add_argument("--seeds", type=Path, metavar="DIR", help="take the seeds of the vectors in DIR")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not args.cases or case.name in args.cases:
            make(case, args.out, args.seeds)


if __name__ == "__main__":
    main()
