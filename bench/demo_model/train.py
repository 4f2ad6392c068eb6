"""Train the demo model: a small ReGLU Llama, from scratch, on text files given as arguments.

Owns the recipe: tokenizer, data mixture, optimizer, sparsity pressure, export as a Hugging Face directory with a model
card. It leaves out everything about packs; `flashsparse convert` reads what this writes. Needs torch and transformers.

The recipe: Muon on the matrices but the gates, AdamW on those and the rest; books first, stories at the end; a
ProSparse-style L1 term on the FFN's intermediate values (arXiv 2402.13516, section 3.2) whose weight rises along a half
cosine late in training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
CHOICES = {"gate_optimizer": ("muon", "adamw"), "activation": ("relu", "silu")}


@dataclass
class Recipe:
    """What a run is made of; every field is a command-line option."""

    books: Path
    stories: Path
    valid: Path
    out: Path
    work: Path
    tokens: int = 20_000_000
    minutes: float = 1e9
    activation: str = "relu"
    hidden_size: int = 256
    intermediate_size: int = 1152
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 4096
    context: int = 512
    batch: int = 16
    lr: float = 2e-3
    l1: float = 0.05
    l1_start: float = 0.45
    gate_noise: float = 0.0
    gate_optimizer: str = "adamw"
    stories_start: float = 0.75
    stories_share: float = 0.7
    seed: int = 0
    threads: int = 0
    compile: bool = True


def read_text(path: Path) -> str:
    """Return the text of a plain or zstd-compressed UTF-8 file."""
    raw = path.read_bytes()
    if path.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(raw).read()
    return raw.decode("utf-8")


def documents(text: str) -> Iterator[str]:
    for part in text.split(END):
        if part.strip():
            yield part.strip()


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE trained on all stories and a sample of the books."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    books = read_text(recipe.books)[:12_000_000]
    tokenizer.train_from_iterator([read_text(recipe.stories), *documents(books)], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, path: Path, cache: Path) -> np.ndarray:
    """Token ids of a text file, documents joined by the end token; cached beside the run."""
    if cache.exists():
        return np.load(cache, mmap_mode="r")
    end = tokenizer.token_to_id(END)
    chunks = []
    for doc in documents(read_text(path)):
        pieces = [doc[i : i + 100_000] for i in range(0, len(doc), 100_000)]
        for piece in tokenizer.encode_batch(pieces, add_special_tokens=False):
            chunks.append(np.array(piece.ids, np.uint16))
        chunks.append(np.array([end], np.uint16))
    ids = np.concatenate(chunks)
    np.save(cache, ids)
    return ids


class Pressure:
    """Collects each FFN's mean |intermediate| so that the loss can push it down, and drops neurons that barely fire.

    `noise`: Gaussian noise, as a share of the layer's standard deviation, on the decision whether a gate is open, never
    on its value: a neuron near its boundary is dropped at random, so that no single one of them comes to matter (the
    idea of noisy gating, arXiv 1701.06538 section 2.1).
    """

    def __init__(self, model: LlamaForCausalLM, noise: float = 0.0) -> None:
        self.noise = noise
        self.terms: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.forward = self._forward(layer.mlp)

    def _forward(self, mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            gate = mlp.gate_proj(x)
            hidden = mlp.act_fn(gate) * mlp.up_proj(x)
            if self.noise:
                hidden = hidden * (gate + self.noise * gate.std() * torch.randn_like(gate) > 0)
            self.terms.append(hidden.abs().mean())
            return mlp.down_proj(hidden)

        return forward

    def take(self) -> torch.Tensor:
        total = torch.stack(self.terms).sum()
        self.terms.clear()
        return total


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        vocab_size=recipe.vocab,
        max_position_embeddings=recipe.context,
        hidden_act=recipe.activation,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    return model


class Muon(torch.optim.Optimizer):
    """Muon in float32 (torch's own rounds to bfloat16, which many CPUs multiply very slowly).

    Momentum 0.95, Nesterov, five quintic Newton-Schulz steps; updates scaled to AdamW's usual root mean square
    (0.2 * sqrt(max(rows, columns)), arXiv 2502.16982). Matrices of one shape are orthogonalized as a batch.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                update = self._orthogonal(torch.stack([self._direction(p) for p in members]))
                for p, u in zip(members, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def _direction(self, p: torch.nn.Parameter) -> torch.Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 0.05)
        return p.grad.lerp(state["momentum"], 0.95)

    @staticmethod
    def _orthogonal(g: torch.Tensor) -> torch.Tensor:
        tall = g.shape[-2] > g.shape[-1]
        x = g.mT if tall else g
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x


Optimizers = list[torch.optim.Optimizer]


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> Optimizers:
    """Muon for the matrices but, with `gate_optimizer` "adamw", the gates: Muon's are of full rank, so that they answer
    the inputs' few strong directions no more than any other, and a low-bit copy's errors weigh as much as its scores.
    """
    named = dict(model.named_parameters())
    gates = {n for n in named if "gate_proj" in n and recipe.gate_optimizer == "adamw"}
    rest = {n for n, p in named.items() if p.ndim != 2 or "embed" in n}
    adamw = [
        {"params": [named[n] for n in named if n in rest], "weight_decay": 0.0},
        {"params": [named[n] for n in named if n in gates], "weight_decay": 0.05},
    ]
    return [
        Muon([named[n] for n in named if n not in rest | gates], lr=recipe.lr, weight_decay=0.05),
        torch.optim.AdamW([group for group in adamw if group["params"]], lr=recipe.lr, betas=(0.9, 0.98)),
    ]


def learning_rate(progress: float) -> float:
    """Short warm-up, flat, then linear to 4 % over the last 45 %."""
    if progress < 0.01:
        return progress / 0.01
    return 1.0 if progress < 0.55 else 0.04 + 0.96 * (1 - progress) / 0.45


def pressure_weight(progress: float, recipe: Recipe) -> float:
    """Half-cosine rise from l1_start to 90 % of the run, then flat (ProSparse's progressive schedule, one stage)."""
    phase = min(max((progress - recipe.l1_start) / (0.9 - recipe.l1_start), 0.0), 1.0)
    return recipe.l1 * 0.5 * (1 - math.cos(math.pi * phase))


class Batches:
    def __init__(self, recipe: Recipe, books: np.ndarray, stories: np.ndarray) -> None:
        self.recipe, self.books, self.stories = recipe, books, stories
        self.rng = np.random.default_rng(recipe.seed)

    def draw(self, progress: float) -> torch.Tensor:
        late = progress >= self.recipe.stories_start
        share = self.recipe.stories_share if late else 0.12
        rows = [self._row(self.stories if self.rng.random() < share else self.books) for _ in range(self.recipe.batch)]
        return torch.from_numpy(np.stack(rows))

    def _row(self, ids: np.ndarray) -> np.ndarray:
        start = self.rng.integers(0, len(ids) - self.recipe.context - 1)
        return ids[start : start + self.recipe.context + 1].astype(np.int64)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Bits per UTF-8 byte of `text`, in windows of `context` tokens, each starting with no history."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    nats, width = 0.0, context
    for start in range(0, len(ids) - 1, width):
        window = ids[start : start + width + 1][None]
        logits = model(input_ids=window[:, :-1]).logits.float()
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    skipped = len(tokenizer.decode([int(ids[0])]).encode())
    return nats / math.log(2) / (len(text.encode()) - skipped)


@torch.no_grad()
def sparsity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, context: int) -> list[float]:
    """Share of FFN intermediate values that are exactly zero, per layer."""
    zeros: list[list[float]] = [[] for _ in model.model.layers]
    hooks = []
    for index, layer in enumerate(model.model.layers):
        keep = zeros[index]
        hooks.append(
            layer.mlp.act_fn.register_forward_hook(
                lambda m, i, o, keep=keep: keep.append((o == 0).float().mean().item())
            )
        )
    ids = torch.tensor(tokenizer.encode(text).ids)
    for start in range(0, len(ids) - context, context):
        model(input_ids=ids[None, start : start + context])
    for hook in hooks:
        hook.remove()
    return [float(np.mean(z)) for z in zeros]


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0].tolist())


def train(recipe: Recipe, tokenizer: Tokenizer) -> tuple[LlamaForCausalLM, dict[str, float]]:
    books = encode(tokenizer, recipe.books, recipe.work / "books.npy")
    stories = encode(tokenizer, recipe.stories, recipe.work / "stories.npy")
    print(f"books {len(books):,} tokens, stories {len(stories):,} tokens", flush=True)
    model, batches = make_model(recipe), Batches(recipe, books, stories)
    pressure = Pressure(model, recipe.gate_noise)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), pressure.take()

    run = torch.compile(step) if recipe.compile else step
    chosen = optimizers(model, recipe)
    state = resume(recipe, model, chosen, batches)
    done, spent, count = state["tokens"], state["seconds"], state["steps"]
    began = saved = time.monotonic()
    while True:
        elapsed = spent + time.monotonic() - began
        progress = max(done / recipe.tokens, elapsed / 60 / recipe.minutes)
        if progress >= 1:
            break
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * learning_rate(progress)
        tick = time.monotonic()
        rows = batches.draw(progress)
        loss, magnitude = run(rows[:, :-1], rows[:, 1:])
        (loss + pressure_weight(progress, recipe) * magnitude).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done, count = done + recipe.batch * recipe.context, count + 1
        if count % 10 == 0:
            print(
                f"step {count} tokens {done / 1e6:.2f}M progress {progress:.3f} loss {loss.item():.3f} "
                f"|h| {magnitude.item():.4f} tok/s {recipe.batch * recipe.context / (time.monotonic() - tick):.0f}",
                flush=True,
            )
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            save_state(recipe, model, chosen, batches, {"tokens": done, "seconds": elapsed, "steps": count})
    for layer in model.model.layers:
        del layer.mlp.forward
    return model.eval(), {"tokens": done, "minutes": round(elapsed / 60, 1), "steps": count}


def save_state(recipe: Recipe, model: Any, chosen: Optimizers, batches: Batches, counts: dict[str, float]) -> None:
    blob = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in chosen], "counts": counts}
    blob["rng"] = json.dumps(batches.rng.bit_generator.state)
    torch.save(blob, recipe.work / "state.tmp")
    (recipe.work / "state.tmp").replace(recipe.work / "state.pt")


def resume(recipe: Recipe, model: Any, chosen: Optimizers, batches: Batches) -> dict[str, Any]:
    path = recipe.work / "state.pt"
    if not path.exists():
        return {"tokens": 0, "seconds": 0.0, "steps": 0}
    blob = torch.load(path, weights_only=True)
    model.load_state_dict(blob["model"])
    for optimizer, saved in zip(chosen, blob["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    batches.rng.bit_generator.state = json.loads(blob["rng"])
    return blob["counts"]


def export(recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, report: dict[str, Any]) -> None:
    """Write the Hugging Face directory: float16 weights, tokenizer, configurations, model card."""
    out = recipe.out
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out, safe_serialization=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.context,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "README.md").write_text(card(recipe, report))


def card(recipe: Recipe, report: dict[str, Any]) -> str:
    shape = (
        f"hidden {recipe.hidden_size}, FFN {recipe.intermediate_size}, {recipe.layers} layers, {recipe.heads} heads, "
        f"{recipe.kv_heads} KV heads, vocabulary {recipe.vocab}, context {recipe.context}"
    )
    quality = (
        f"{report['bits_per_byte']:.4f} bits per byte on {report['valid_bytes']:,} bytes of other books, "
        f"windows of {recipe.context} tokens"
    )
    layers = "\n".join(f"| {i} | {100 * s:.1f} % |" for i, s in enumerate(report["sparsity_per_layer"]))
    length = f"--minutes {recipe.minutes:g}" if recipe.minutes < 1e9 else f"--tokens {recipe.tokens}"
    return f"""# FlashSparse demo model

A Llama-style model with a gated FFN and `{recipe.activation}` as its activation, trained from scratch on public-domain
books and short stories. It exists to show and test FlashSparse; it knows nothing and should not be asked for facts.

| | |
|---|---|
| parameters | {report["parameters"]:,} (embeddings and head are one matrix) |
| shape | {shape} |
| trained on | {report["tokens"]:,} tokens, {report["steps"]} steps, {report["minutes"]} minutes on CPU |
| validation | {quality} |
| mean sparsity | {100 * report["sparsity"]:.1f} % of gate outputs are exactly zero on that text |

| layer | zero gate outputs |
|---|---|
{layers}

Text: Project Gutenberg books (public domain in the US) and TinyStories (CDLA-Sharing). Weights: MIT, as FlashSparse.

## A greedy sample

> {report["sample"].replace(chr(10), chr(10) + "> ")}

## Make it again

    python bench/demo_model/train.py --books books-train.txt.zst --stories tinystories-train.txt.zst \\
        --valid books-valid.txt.zst --work WORK --out OUT {length} --l1 {recipe.l1:g}
"""


def parse() -> Recipe:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, field in Recipe.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        if field.type == "Path":
            parser.add_argument(flag, type=Path, required=True)
        elif field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(
                flag,
                type={"int": int, "float": float, "str": str}[str(field.type)],
                default=field.default,
                choices=CHOICES.get(name),
            )
    return Recipe(**vars(parser.parse_args()))


def main() -> None:
    recipe = parse()
    torch.manual_seed(recipe.seed)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe.work.mkdir(parents=True, exist_ok=True)
    vocabulary = recipe.work / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(recipe).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    model, counts = train(recipe, tokenizer)
    # Rounded as it will be stored, so that the card speaks of the stored weights.
    model.half().float()
    valid = read_text(recipe.valid)[200_000:600_000]
    per_layer = sparsity(model, tokenizer, valid[:100_000], recipe.context)
    report = {
        **counts,
        "parameters": model.num_parameters(),
        "bits_per_byte": bits_per_byte(model, tokenizer, valid, recipe.context),
        "valid_bytes": len(valid.encode()),
        "sparsity": float(np.mean(per_layer)),
        "sparsity_per_layer": per_layer,
        "sample": sample(model, tokenizer, "Once upon a time, there was a little", 200),
        "torch": torch.__version__,
    }
    export(recipe, model, tokenizer, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
