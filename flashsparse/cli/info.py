"""`flashsparse info`: what a pack holds, as aligned lines or as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flashsparse.cli.report import quality_report


@click.command()
@click.argument("pack", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(pack: Path, as_json: bool) -> None:
    """Show PACK: shapes, tier, activation, bytes per part, parameters in total and activated per token, quality.

    Reads the manifest and headers only; `flashsparse verify` checks the data.
    """
    from flashsparse.pack.inspect import describe
    from flashsparse.quality.record import read_quality

    facts = describe(pack)
    facts["quality"], facts["quality_problem"] = read_quality(pack, facts["digest"])
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, text in lines(facts):
        click.echo(f"{name:<14}{text}".rstrip())


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of every printed line."""
    shapes, record = facts["shapes"], facts["record"]
    result = [
        ("model", f"{facts['source_model_type']} (runs as {facts['family']})"),
        ("tier", f"{facts['tier']}, gate layout {facts['gate']}"),
        ("activation", _activation(facts["activation"])),
        ("weights", _weights(facts)),
        ("layers", f"{shapes['layers']} x {shapes['intermediate_size']} neurons, hidden size {shapes['hidden_size']}"),
        ("attention", _attention(shapes)),
        ("vocabulary", _vocabulary(shapes)),
        ("record", _record(record)),
        ("direct reads", _amplification(record)),
        ("prefill", f"chunks of at most {facts['prefill_chunk']} tokens"),
    ]
    if facts["order"] is not None:
        result.append(("order", _order(facts["order"])))
    if facts["activity"] is not None:
        result.append(("activity", _activity(facts["activity"])))
    if facts["codec"] is not None:
        result.append(
            ("codec", f"{facts['codec']['name']}: {facts['codec']['ratio']:.2f} times fewer bytes per record")
        )
    if facts["predictor"] is not None:
        result += _predictor(facts["predictor"])
    result += _bytes(facts["bytes"]) + _parameters(facts)
    said = quality_report(facts["tier"], facts["quality"], facts["quality_problem"])
    return [*result, *zip(("quality", ""), said, strict=False), ("digest", facts["digest"])]


def _activity(activity: dict[str, Any]) -> str:
    """How many neurons a token needs, as calibrated; slots are divided by it."""
    least, most = min(activity["densities"]), max(activity["densities"])
    return f"{100 * least:.1f} to {100 * most:.1f} % of a layer's neurons, measured on {activity['tokens']} tokens"


def _order(order: dict[str, Any]) -> str:
    """How records are ordered on flash."""
    if order["kind"] == "random":
        return f"random, seed {order['seed']}"
    return f"{order['kind']}, measured on {order['tokens']} tokens"


def _activation(activation: dict[str, Any]) -> str:
    param = "" if activation["param"] is None else f", threshold {activation['param']:g}"
    name, source = str(activation["name"]), "the checkpoint's configuration"
    if activation["source"] == "option":
        source = "--activation, which overrode the checkpoint's configuration"
    return f"{name}{param} (from {source})"


def _weights(facts: dict[str, Any]) -> str:
    source, quant = str(facts["source_dtype"]), facts["quant"]
    if quant is None:
        return source
    bits = " and ".join(str(b) for b in sorted({one["bits"] for one in facts["resident_quant"].values()}))
    return f"{quant['bits']} bits in groups of {quant['group_size']}, resident matrices {bits} bits, from {source}"


def _attention(shapes: dict[str, Any]) -> str:
    text = f"{shapes['heads']} heads of {shapes['head_dim']}, {shapes['kv_heads']} for keys and values"
    if shapes["sliding_window"]:
        text += f", window {shapes['sliding_window']}"
    return f"{text}, context {shapes['max_position_embeddings']}"


def _vocabulary(shapes: dict[str, Any]) -> str:
    """Of a tied embedding every token needs all rows, as its head; of another one."""
    head, place = ("tied", "in memory") if shapes["tie_word_embeddings"] else ("untied", "in memory or on flash")
    return f"{shapes['vocab_size']} tokens, {head} head: the embedding is {place}"


def _record(record: dict[str, Any]) -> str:
    fields = ", ".join(field["name"] for field in record["fields"])
    padding = 100 * (record["stride_amplification"] - 1)
    return f"{record['bytes']} bytes ({fields}), stride {record['stride']} (+{padding:.1f} % padding)"


def _amplification(record: dict[str, Any]) -> str:
    parts = [
        f"{value:.2f} x the record at {size}-byte sectors"
        for size, value in record["direct_read_amplification"].items()
    ]
    return ", ".join(parts)


def _predictor(predictor: dict[str, Any]) -> list[tuple[str, str]]:
    """How neurons are chosen, and what was measured on the calibration text."""
    bits, ranks = ("/".join(map(str, predictor[key])) for key in ("bits", "ranks"))
    size = f", {bits} bits" if bits else f", rank {ranks}" if ranks else ""
    target = predictor["target"]
    if predictor["target_value"] is not None:
        target += f" {predictor['target_value']:g}"
    result = [("predictor", f"{predictor['score']}{size}, {predictor['selection']}, calibrated to: {target}")]
    if predictor["density"] is not None:
        density, recall = predictor["density"], predictor["value_recall"]
        shares = f"{100 * density['mean']:.1f} % of a layer's neurons (layers {_percents(density)})"
        kept = f", value recall {_percents(recall)}" if recall else ""
        result.append(("  calibrated", f"on {predictor['tokens']} tokens: {shares}{kept}"))
    if predictor["whole_layers"]:
        result.append(("  whole", f"layers {', '.join(map(str, predictor['whole_layers']))} are computed whole"))
    return result


def _percents(share: dict[str, float]) -> str:
    return f"{100 * share['least']:.1f} to {100 * share['most']:.1f} %"


def _bytes(sizes: dict[str, int]) -> list[tuple[str, str]]:
    from flashsparse.memory import format_bytes

    resident = ("embeddings", "head", "attention", "ffn", "other")
    parts = ", ".join(f"{part} {format_bytes(sizes[f'resident_{part}'])}" for part in resident)
    return [
        ("on disk", f"{format_bytes(sizes['total'])}"),
        ("  flash", f"{format_bytes(sizes['flash'])} ({format_bytes(sizes['flash_per_layer'])} per layer)"),
        ("  resident", f"{format_bytes(sizes['resident'])} ({parts})"),
        *([("  predictor", format_bytes(sizes["predictor"]))] if sizes["predictor"] else []),
        ("  tokenizer", f"{format_bytes(sizes['tokenizer'])}"),
    ]


def _parameters(facts: dict[str, Any]) -> list[tuple[str, str]]:
    counts, activated = facts["parameters"], facts["activated_per_token"]
    names = ("ffn", "attention", "embeddings", "head", "other", "predictors")
    parts = ", ".join(f"{name} {_count(counts[name])}" for name in names if counts[name])
    without = _count(counts["total_without_embeddings"])
    result = [("parameters", f"{_count(counts['total'])} ({parts}); {without} without embeddings and head")]
    known = activated["active_density"]
    for row in activated["at_density"]:
        text = f"{_count(row['all'])} per token, {_count(row['without_embeddings'])} without embeddings and head"
        if counts["predictors"]:
            text += f", {_count(row['without_both'])} without predictors too"
        share = _share(known, row["density"])
        result.append(("activated" if row is activated["at_density"][0] else "", f"{text} ({share} active)"))
    if known is None:
        result.append(("", "the share is the text's and the model's: `generate --json` reports what a run read"))
    return result


def _share(known: float | None, density: float) -> str:
    if known == 1:
        return "every neuron"
    text = f"{100 * density:.3g} % of the neurons are"
    return f"if {text}" if known is None else f"as calibrated, {text}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
