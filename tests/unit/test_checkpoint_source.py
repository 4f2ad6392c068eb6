"""What the converter accepts as a source: shards, index, pickles, repository ids. No weights are converted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from converter import hub
from converter.hub import find_source
from converter.plan import Options, make_plan
from converter.source import open_checkpoint
from flashsparse.errors import CheckpointError, SourceUnavailableError, UnsupportedModelError, UsageError
from tests.checkpoints import write_checkpoint, write_safetensors

INDEX = "model.safetensors.index.json"


def edit_index(path: Path, change: dict[str, str | None]) -> None:
    index = json.loads((path / INDEX).read_text())
    for name, file in change.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (path / INDEX).write_text(json.dumps(index))


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def plan(path: Path, **options: object) -> object:
    with open_checkpoint(path) as checkpoint:
        return make_plan(checkpoint, Options(**options))  # type: ignore[arg-type]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", shards=3)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_rows_and_columns(sharded: Path) -> None:
    with open_checkpoint(sharded) as checkpoint:
        tensor = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
        whole = checkpoint.rows(tensor, 0, 64)
        assert whole.shape == (64, 96)
        assert np.array_equal(checkpoint.rows(tensor, 5, 9), whole[5:9])
        assert np.array_equal(checkpoint.columns(tensor, 7, 50), whole[:, 7:50])
        assert np.array_equal(checkpoint.columns(tensor, 0, 96), whole)


def test_index_names_a_tensor_that_is_nowhere(sharded: Path) -> None:
    edit_index(sharded, {"model.extra.weight": first_shard(sharded).name})
    refused(sharded, INDEX, "model.extra.weight", first_shard(sharded).name)


def test_shard_holds_a_tensor_the_index_does_not_name(sharded: Path) -> None:
    edit_index(sharded, {"model.norm.weight": None})
    refused(sharded, "model.norm.weight", INDEX)


def test_swapped_shards(sharded: Path) -> None:
    one, two, _ = sorted(sharded.glob("*.safetensors"))
    one.rename(sharded / "aside")
    two.rename(one)
    (sharded / "aside").rename(two)
    refused(sharded, INDEX, one.name, two.name)


def test_tensor_in_two_shards(sharded: Path) -> None:
    one, two, _ = sorted(sharded.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    refused(sharded, one.name, two.name, "once")


def test_missing_shard(sharded: Path) -> None:
    first_shard(sharded).unlink()
    refused(sharded, "model-00001-of-00003.safetensors", "missing")


@pytest.mark.parametrize("file", ["../model.safetensors", "weights.bin", "", "/etc/passwd"])
def test_index_leads_astray(sharded: Path, file: str) -> None:
    edit_index(sharded, {"model.norm.weight": file})
    refused(sharded, INDEX, "model.norm.weight")


def test_index_beside_another_single_file(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(first_shard(sharded).read_bytes())
    refused(sharded, "model.safetensors", INDEX)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "model-00001-of-00003.safetensors", INDEX)


def test_a_pack_is_no_checkpoint(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / "pack.json").touch()
    refused(sharded, "found a pack", "converted from")


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_truncated_shard(single: Path, cut: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    refused(single, "model.safetensors", "found", "expected")


def test_flipped_bits_in_the_header(single: Path) -> None:
    """A flipped bit in the header is refused, or leaves a checkpoint of the very same shapes (metadata, spaces)."""
    file = single / "model.safetensors"
    sound = file.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    rng = np.random.default_rng(0)
    wrong = 0
    for position in rng.integers(0, 8 + length, 150):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            plan(single)
        except (CheckpointError, UnsupportedModelError):
            wrong += 1
    assert wrong > 130


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    refused(single, name, "pickle", "safetensors")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "no weights")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"a": NaN', "\ud800"])
def test_config(single: Path, text: str | None) -> None:
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(single, "config.json")


def rewrite(path: Path, change: dict[str, tuple[str, np.ndarray] | None]) -> None:
    """Changes, adds or (None) removes tensors of a float32 checkpoint of one file."""
    with open_checkpoint(path) as checkpoint:
        tensors = {
            name: (tensor.dtype, checkpoint.rows(tensor, 0, tensor.shape[0]))
            for name, tensor in checkpoint.tensors.items()
        }
    for name, value in change.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    write_safetensors(path / "model.safetensors", tensors)


def test_missing_tensor(single: Path) -> None:
    rewrite(single, {"model.layers.1.mlp.up_proj.weight": None})
    refused(single, "model.layers.1.mlp.up_proj.weight", "missing", "[96, 64]")


def test_wrong_shape(single: Path) -> None:
    rewrite(single, {"model.layers.1.mlp.up_proj.weight": ("F32", np.zeros((96, 32), np.float32))})
    refused(single, "model.layers.1.mlp.up_proj.weight", "[96, 32]", "[96, 64]")


def test_unknown_tensor(single: Path) -> None:
    rewrite(single, {"model.layers.0.self_attn.q_norm.weight": ("F32", np.zeros(16, np.float32))})
    refused(single, "model.layers.0.self_attn.q_norm.weight", "not part of this architecture")


def test_old_rotary_buffers_are_left_out(single: Path) -> None:
    rewrite(single, {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.zeros(8, np.float32))})
    assert plan(single)


@pytest.mark.parametrize("dtype", ["F16", "I8", "F64"])
def test_mixed_types(single: Path, dtype: str) -> None:
    array = np.zeros((96, 64), {"F16": np.float16, "I8": np.int8, "F64": np.float64}[dtype])
    rewrite(single, {"model.layers.1.mlp.gate_proj.weight": (dtype, array)})
    refused(single, "model.layers.1.mlp.gate_proj.weight", dtype, "F32")


def test_mixed_norms(tmp_path: Path) -> None:
    assert plan(write_checkpoint(tmp_path / "wide", dtype="BF16", norm_dtype="F32"))
    refused(write_checkpoint(tmp_path / "narrow", dtype="F32", norm_dtype="BF16"), "norm", "BF16", "F32")


def test_record_biases_have_the_weights_type(single: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "bias", dtype="F16", mlp_bias=True)
    with open_checkpoint(path) as checkpoint:
        bias = checkpoint.rows(checkpoint.tensors["model.layers.0.mlp.up_proj.bias"], 0, 96).astype(np.float32)
    rewrite(path, {"model.layers.0.mlp.up_proj.bias": ("F32", bias)})
    refused(path, "model.layers.0.mlp.up_proj.bias", "F32", "F16")


def test_quantized(single: Path) -> None:
    edit_config(single, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="quantiz"):
        plan(single)


def test_silu_is_not_exact(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "silu", activation="silu")
    assert plan(path).tier == "dense"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"exact zeros.*silu.*--tier dense"):
        plan(path, tier="exact")
    assert plan(path, activation="relu").tier == "exact"  # type: ignore[attr-defined]


def test_tied_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tied", tie=True)
    with open_checkpoint(path) as checkpoint:
        embedding = checkpoint.rows(checkpoint.tensors["model.embed_tokens.weight"], 0, 128)
    rewrite(path, {"lm_head.weight": ("F32", embedding)})
    assert "lm_head.weight" not in plan(path).resident_tensors  # type: ignore[attr-defined]
    rewrite(path, {"lm_head.weight": ("F32", embedding + 1)})
    refused(path, "lm_head.weight", "tie_word_embeddings")


def test_opt_without_prefix(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "opt", "opt", tie=True)
    with_prefix = plan(path)
    with open_checkpoint(path) as checkpoint:
        renamed = {
            name.removeprefix("model."): (tensor.dtype, checkpoint.rows(tensor, 0, tensor.shape[0]))
            for name, tensor in checkpoint.tensors.items()
        }
    write_safetensors(path / "model.safetensors", renamed)
    assert plan(path).resident_tensors == with_prefix.resident_tensors  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"group_size": 16}, {"tier": "sparse"}, {"gate": "small"}, {"activation": "gelu"}]
)
def test_options(single: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        plan(single, **options)


def test_group_size_must_divide(single: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"128 does not divide hidden_size.*--group-size 32 or 64"):
        plan(single, bits=4, group_size=128)
    odd = write_checkpoint(tmp_path / "odd", hidden=48)
    with pytest.raises(UsageError, match="--bits 16"):
        plan(odd, bits=4)
    narrow_heads = write_checkpoint(tmp_path / "narrow", head_dim=24)
    with pytest.raises(UsageError, match=r"o_proj.*--group-size 32"):
        plan(narrow_heads, bits=8)


def test_local_source(single: Path, tmp_path: Path) -> None:
    assert find_source(single) == single
    with pytest.raises(UsageError, match="no such directory"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a directory"):
        open_checkpoint(find_source(single / "config.json"))


def test_downloads_data_files_only(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(single)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_source("owner/name") == single
    assert asked == {"repository": "owner/name", "allow_patterns": hub.ALLOW, "ignore_patterns": hub.IGNORE}
    assert not any("py" in pattern or "bin" in pattern for pattern in hub.ALLOW)
    (single / "model.safetensors").unlink()
    with pytest.raises(SourceUnavailableError, match="no safetensors"):
        find_source("owner/name")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repository: str, **options: object) -> str:
        raise OSError("Name or service\nnot known " * 50)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SourceUnavailableError, match=r"owner/name.*cannot be downloaded") as caught:
        find_source("owner/name")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
