"""Normalized configurations: both forms transformers writes, defaults, and refusal of what is not mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashsparse.errors import CheckpointError, FlashSparseError, UnsupportedModelError, UsageError
from flashsparse.models.config import NormalizedModel, normalize_config, parse_activation
from flashsparse.pack.manifest import Activation

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("*/config.json"))
FULL, SLIDING = "full_attention", "sliding_attention"


def normalized(model_type: str = "llama", option: str | None = None, **fields: Any) -> NormalizedModel:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "num_key_value_heads": 8}
    return normalize_config({"model_type": model_type, **sizes, **fields}, option)


def config(model_type: str = "llama", **fields: Any) -> dict[str, Any]:
    return normalized(model_type, **fields).config


def refused(
    *parts: str, model_type: str = "llama", error: type[FlashSparseError] = UnsupportedModelError, **fields: Any
) -> None:
    with pytest.raises(error) as caught:
        normalized(model_type, **fields)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.parent.name)
def test_reference_configurations_are_understood(path: Path) -> None:
    raw = json.loads(path.read_text())
    model = normalize_config(raw)
    assert model.config["hidden_size"] == raw["hidden_size"]
    assert model.family == ("opt" if raw["model_type"] == "opt" else "llama")
    assert json.loads(json.dumps(model.config)) == model.config


def test_llama_defaults_are_transformers() -> None:
    model = normalize_config({"model_type": "llama"})
    expected = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    assert {name: model.config[name] for name in expected} == expected


def test_mistral_defaults_are_transformers() -> None:
    found = normalize_config({"model_type": "mistral"}).config
    assert (found["num_key_value_heads"], found["intermediate_size"], found["max_position_embeddings"]) == (
        8,
        14336,
        131072,
    )
    assert found["sliding_window"] == 4096
    assert found["layer_types"] == [SLIDING] * 32


def test_qwen2_defaults_are_transformers() -> None:
    found = normalize_config({"model_type": "qwen2"}).config
    assert (found["vocab_size"], found["intermediate_size"], found["max_position_embeddings"]) == (151936, 22016, 32768)
    assert found["num_key_value_heads"] == 32
    assert (found["attention_bias"], found["mlp_bias"]) == (True, False)
    assert (found["bos_token_id"], found["eos_token_id"], found["tie_word_embeddings"]) == (None, None, False)
    assert (found["sliding_window"], found["layer_types"]) == (None, [FULL] * 32)


def test_opt_defaults_are_transformers() -> None:
    model = normalize_config({"model_type": "opt"})
    expected = {
        "vocab_size": 50272,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
        "hidden_act": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    assert {name: model.config[name] for name in expected} == expected
    assert (model.gated, model.kv_heads, model.head_dim) == (False, 12, 64)


def test_null_and_missing_differ_where_they_do_in_transformers() -> None:
    assert config("mistral", num_key_value_heads=None)["num_key_value_heads"] == 8
    assert normalize_config({"model_type": "mistral", "num_key_value_heads": None}).kv_heads == 32
    assert config("mistral", sliding_window=None)["layer_types"] == [FULL] * 4
    assert config(eos_token_id=None)["eos_token_id"] is None
    assert config(eos_token_id=[2, 3])["eos_token_id"] == [2, 3]


def test_real_llama2_configuration() -> None:
    raw = json.loads(
        """{"_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "relu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
        "use_cache": true, "vocab_size": 32000, "pad_token_id": 0}"""
    )
    model = normalize_config(raw)
    assert model.activation == Activation("relu", None, "config")
    assert (model.config["rms_norm_eps"], model.config["torch_dtype"]) == (1e-5, "float16")


def test_real_opt_configuration() -> None:
    raw = json.loads(
        """{"_name_or_path": "opt-350m", "_remove_final_layer_norm": false, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
        "do_layer_norm_before": false, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>",
        "torch_dtype": "float16", "transformers_version": "4.20.0.dev0", "use_cache": true, "vocab_size": 50272,
        "word_embed_proj_dim": 512}"""
    )
    found = normalize_config(raw).config
    assert (found["word_embed_proj_dim"], found["do_layer_norm_before"], found["intermediate_size"]) == (
        512,
        False,
        4096,
    )


class TestRope:
    def test_both_forms_of_theta(self) -> None:
        assert config(rope_theta=5e5)["rope_theta"] == 5e5
        assert config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})["rope_theta"] == 5e5
        assert config(rope_theta=1e4, rope_parameters={"rope_theta": 5e5})["rope_theta"] == 5e5

    @pytest.mark.parametrize("key", ["type", "rope_type"])
    def test_linear_in_every_form(self, key: str) -> None:
        expected = {"rope_type": "linear", "factor": 2.0}
        assert config(rope_scaling={key: "linear", "factor": 2})["rope_scaling"] == expected
        assert config(rope_parameters={key: "linear", "factor": 2.0, "rope_theta": 1e4})["rope_scaling"] == expected

    def test_rope_scaling_wins_as_in_transformers(self) -> None:
        found = config(rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters={"rope_theta": 9.0})
        assert (found["rope_theta"], found["rope_scaling"]["factor"]) == (10000.0, 4.0)

    def test_llama3(self) -> None:
        values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        full = {"rope_type": "llama3", **values, "original_max_position_embeddings": 8192}
        assert config(rope_scaling=full)["rope_scaling"] == full
        assert config(rope_parameters={**full, "rope_theta": 5e5})["rope_scaling"] == full
        found = config(rope_scaling={"rope_type": "llama3", **values}, max_position_embeddings=4096)
        assert found["rope_scaling"]["original_max_position_embeddings"] == 4096

    @pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
    def test_llama3_without_a_field(self, field: str) -> None:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        del scaling[field]
        refused(f"rope_scaling.{field}", error=CheckpointError, rope_scaling=scaling)

    def test_yarn_defaults(self) -> None:
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True}
        assert config(rope_scaling=scaling)["rope_scaling"] == {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        }

    def test_yarn_without_a_factor_uses_the_lengths(self) -> None:
        scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 64}
        assert config(rope_scaling=scaling, max_position_embeddings=256)["rope_scaling"]["factor"] == 4.0
        del scaling["factor"]
        refused("rope_scaling.factor", error=CheckpointError, rope_scaling=scaling)

    def test_yarn_that_mlx_lm_computes_otherwise(self) -> None:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        refused("rope_parameters.truncate", rope_parameters={**yarn, "truncate": False})
        refused("attention_factor", rope_parameters={**yarn, "factor": 1.0, "attention_factor": 1.5})

    @pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional"])
    def test_other_types(self, kind: str) -> None:
        refused(kind, "default, linear, llama3, yarn", rope_scaling={"type": kind, "factor": 2.0})

    def test_unknown_fields(self) -> None:
        refused("rope_scaling.beta", rope_scaling={"type": "linear", "factor": 2.0, "beta": 3})
        refused("rope_parameters.factor", rope_parameters={"rope_type": "default", "factor": 3})

    def test_partial_rotation(self) -> None:
        refused("partial_rotary_factor", "0.5", partial_rotary_factor=0.5)
        refused("partial_rotary_factor", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25})
        assert config(partial_rotary_factor=1.0)["rope_scaling"] is None

    def test_parameters_per_layer_type(self) -> None:
        one, other = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
        assert config(rope_parameters={FULL: one, SLIDING: dict(one)})["rope_theta"] == 1e6
        refused("rope_parameters", "every layer type", rope_parameters={FULL: one, SLIDING: other})
        refused("rope_parameters", rope_parameters={FULL: one, SLIDING: None})

    @pytest.mark.parametrize("theta", [0, -1, "10000", True, float("inf")])
    def test_bad_theta(self, theta: Any) -> None:
        refused("rope_theta", error=CheckpointError, rope_theta=theta)


class TestWindows:
    def test_mistral_slides_everywhere(self) -> None:
        found = config("mistral", sliding_window=32)
        assert (found["layer_types"], found["sliding_window"]) == ([SLIDING] * 4, 32)
        assert config("bamboo", sliding_window=32)["sliding_window"] == 32

    def test_qwen2_slides_only_when_told(self) -> None:
        assert config("qwen2", sliding_window=32)["sliding_window"] is None
        found = config("qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=3)
        assert (found["layer_types"], found["sliding_window"]) == ([FULL] * 3 + [SLIDING], 32)
        none = config("qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=4)
        assert (none["layer_types"], none["sliding_window"]) == ([FULL] * 4, None)

    def test_qwen2_obeys_layer_types(self) -> None:
        types = [SLIDING, FULL, SLIDING, FULL]
        found = config("qwen2", layer_types=types, sliding_window=16, use_sliding_window=True)
        assert (found["layer_types"], found["sliding_window"]) == (types, 16)
        refused("layer_types", model_type="qwen2", layer_types=types, sliding_window=16)

    def test_ambiguous_windows_are_refused(self) -> None:
        refused("sliding_window", sliding_window=64)
        refused("layer_types", layer_types=[SLIDING] * 4)
        refused("layer_types", model_type="mistral", sliding_window=8, layer_types=[FULL] * 4)
        refused("layer_types", layer_types=["linear_attention"] * 4)
        refused("layer_types", layer_types=[FULL] * 3)
        assert config(layer_types=[FULL] * 4, sliding_window=None)["layer_types"] == [FULL] * 4


def test_more_layers_than_can_be_listed() -> None:
    refused("num_hidden_layers", "expected 1 to 10000", error=CheckpointError, num_hidden_layers=10**9)
    refused("num_hidden_layers", error=CheckpointError, model_type="opt", num_hidden_layers=10**9)


class TestActivations:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [("silu", "silu"), ("swish", "silu"), ("relu", "relu"), ("relu2", "relu2"), ("relu_2", "relu2"),
         ("relu-squared", "relu2"), ("drelu", "drelu")],
    )  # fmt: skip
    def test_names(self, name: str, expected: str) -> None:
        model = normalized(hidden_act=name)
        assert model.activation == Activation(expected, None, "config")
        assert model.config["hidden_act"] == expected

    @pytest.mark.parametrize("name", ["gelu", "gelu_new", "shiftrelu", "relu6", "SiLU"])
    def test_unknown(self, name: str) -> None:
        refused("hidden_act", name, "silu, relu, relu2, fatrelu, drelu", hidden_act=name)
        refused("activation_function", name, model_type="opt", num_key_value_heads=None, activation_function=name)

    def test_prosparse(self) -> None:
        model = normalized("sparsellama", hidden_act="fatrelu", hidden_act_param=0.01, auto_map={"AutoModel": "x.Y"})
        assert model.activation == Activation("fatrelu", 0.01, "config")
        assert (model.config["hidden_act"], model.config["hidden_act_param"]) == ("fatrelu", 0.01)
        refused("hidden_act_param", model_type="sparsellama", error=CheckpointError, hidden_act="fatrelu")
        refused("hidden_act_param", hidden_act="relu", hidden_act_param=0.5)

    def test_bamboo_means_drelu(self) -> None:
        assert normalized("bamboo", hidden_act="relu").activation.name == "drelu"
        assert normalized("bamboo").activation.name == "drelu"
        refused("hidden_act", "silu", model_type="bamboo", hidden_act="silu")

    def test_option_overrides_and_is_recorded(self) -> None:
        model = normalized("qwen2", option="drelu", hidden_act="silu")
        assert model.activation == Activation("drelu", None, "option")
        assert model.config["hidden_act"] == "drelu"
        assert normalized(option="relu", hidden_act="something-new").activation.name == "relu"
        assert normalized("bamboo", option="relu").activation == Activation("relu", None, "option")
        assert normalized(option="fatrelu:0.03").config["hidden_act_param"] == 0.03

    def test_option_parser(self) -> None:
        assert parse_activation("fatrelu:0.01") == Activation("fatrelu", 0.01, "option")
        assert parse_activation("fatrelu:0") == Activation("fatrelu", 0.0, "option")
        assert parse_activation("swish") == Activation("silu", None, "option")
        for text in ("gelu", "", "relu:0.1", "fatrelu", "fatrelu:", "fatrelu:x", "fatrelu:-1", "fatrelu:nan"):
            with pytest.raises(UsageError, match="--activation"):
                parse_activation(text)
        with pytest.raises(UsageError, match="supported: silu, relu, relu2, fatrelu, drelu"):
            parse_activation("gelu")

    def test_drelu_needs_a_gate(self) -> None:
        with pytest.raises(UnsupportedModelError, match="gate"):
            normalize_config({"model_type": "opt"}, "drelu")


class TestRefusals:
    def test_unknown_architecture_lists_the_supported(self) -> None:
        listed = "bamboo, llama, minicpm, mistral, opt, qwen2, sparsellama"
        refused("model_type", "'gpt2'", listed, model_type="gpt2")
        refused("model_type", listed, model_type="brandnew", auto_map={"AutoModel": "x.Y"})
        with pytest.raises(UnsupportedModelError, match="model_type"):
            normalize_config({"hidden_size": 4})

    def test_custom_code_of_a_known_architecture(self) -> None:
        refused("auto_map", auto_map={"AutoModelForCausalLM": "modeling.Model"})

    @pytest.mark.parametrize("field", ["quantization_config", "quantization", "compression_config"])
    def test_quantized_checkpoints(self, field: str) -> None:
        refused(field, **{field: {"bits": 4}})
        assert config(**{field: None})["hidden_size"] == 64

    @pytest.mark.parametrize(
        ("field", "value"),
        [("residual_multiplier", 0.22), ("attn_logit_softcapping", 50.0), ("scale_emb", 12), ("logit_scale", 0.5),
         ("is_encoder_decoder", True), ("rope_interleaved", True), ("pruned_heads", {"0": [1]}), ("new_thing", False)],
    )  # fmt: skip
    def test_fields_that_may_change_the_result(self, field: str, value: Any) -> None:
        refused(field, repr(value), **{field: value})
        assert config(**{field: None})["hidden_size"] == 64

    def test_opt_without_norm_parameters(self) -> None:
        refused(
            "layer_norm_elementwise_affine",
            model_type="opt",
            num_key_value_heads=None,
            layer_norm_elementwise_affine=False,
        )

    def test_opt_without_biases_is_kept(self) -> None:
        assert config("opt", num_key_value_heads=None, enable_bias=False)["enable_bias"] is False

    @pytest.mark.parametrize(
        ("field", "value"),
        [("hidden_size", 0), ("hidden_size", "64"), ("hidden_size", True), ("hidden_size", 60), ("vocab_size", 1.5),
         ("num_key_value_heads", 3), ("rms_norm_eps", 0), ("rms_norm_eps", "1e-5"), ("tie_word_embeddings", 1),
         ("hidden_act", 3), ("eos_token_id", "</s>"), ("rope_scaling", "linear"), ("attention_bias", None),
         ("max_position_embeddings", 2**31 + 1), ("rope_theta", 10**400), ("eos_token_id", 2**70),
         ("rope_scaling", {"rope_type": "linear", "factor": float("inf")})],
    )  # fmt: skip
    def test_wrong_types(self, field: str, value: Any) -> None:
        if value is None:
            assert config(**{field: value})[field] is False
        else:
            refused(field, error=CheckpointError, **{field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [("beta_fast", "32"), ("beta_slow", -1), ("factor", True), ("original_max_position_embeddings", "512")],
    )
    def test_wrong_types_in_yarn(self, field: str, value: Any) -> None:
        yarn = {"rope_type": "yarn", "factor": 2.0}
        refused(field, error=CheckpointError, rope_scaling=yarn | {field: value})
        assert config(rope_scaling=yarn | {"beta_fast": None})["rope_scaling"]["beta_fast"] == 32.0

    def test_yarn_needs_a_base_with_a_logarithm(self) -> None:
        refused("rope_theta", error=CheckpointError, rope_theta=1.0, rope_scaling={"rope_type": "yarn", "factor": 2.0})

    def test_wrong_type_of_the_original_length(self) -> None:
        scaling = {"rope_type": "yarn", "factor": 2.0}
        name = "original_max_position_embeddings"
        refused(name, error=CheckpointError, rope_scaling=scaling, **{name: "512"})

    def test_odd_head_dimension(self) -> None:
        refused("head_dim", head_dim=7)
        assert config(head_dim=16)["head_dim"] == 16


MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "auto_map": {"AutoConfig": "x.MiniCPMConfig"}}


def test_minicpm_scales() -> None:
    """MiniCPM-S-1B: embeddings times 12, residuals times 1.4 / sqrt(layers), logits over width / 256."""
    sizes = {"hidden_size": 1536, "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 52}
    act = {"hidden_act": "fatrelu", "hidden_act_param": 0.03}
    model = normalize_config({"model_type": "minicpm", **sizes, **act, **MUP, "dim_model_base": 256})
    assert (model.family, model.source_model_type) == ("llama", "minicpm")
    assert model.activation == Activation("fatrelu", 0.03)
    assert model.config["embedding_multiplier"] == 12
    assert model.config["residual_multiplier"] == pytest.approx(1.4 / 52**0.5, rel=1e-15)
    assert model.config["logits_divisor"] == 6
    assert model.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", ["scale_emb", "scale_depth", "dim_model_base"])
def test_minicpm_scales_have_no_default(name: str) -> None:
    refused(name, model_type="minicpm", error=CheckpointError, **{k: v for k, v in MUP.items() if k != name})
    for bad in (0, -1.4, "12", True, float("inf")):
        refused(name, model_type="minicpm", error=CheckpointError, **{**MUP, name: bad})


def test_minicpm_parts_that_are_not_supported() -> None:
    refused("num_experts", model_type="minicpm", **MUP, num_experts=8)
    refused("use_mup", model_type="minicpm", **MUP, use_mup=False)
    refused("mlp_bias", model_type="minicpm", **MUP, mlp_bias=True)
    refused("rope_type", model_type="minicpm", **MUP, rope_scaling={"type": "longrope", "factor": 2.0})
    assert normalized("minicpm", **MUP, num_experts=0).config["hidden_act"] == "silu"


@pytest.mark.parametrize("name", ["scale_emb", "scale_depth", "dim_model_base"])
def test_scales_of_another_model_type_are_refused(name: str) -> None:
    refused(name, **{name: MUP[name]})
    assert "residual_multiplier" not in config()
