"""flashrt inspect: what a pack holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, emit, show, size, table
from flashrt.errors import PackError

if TYPE_CHECKING:
    from flashrt.spec import ModelSpec
    from flashrt.storage.pack import Pack

_HEADS = ("heads", "kv_heads", "head_dim")


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(inspect))


def inspect(
    pack: options.Model,
    dtype: options.Dtype = options.DtypeName.AUTO,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Say what a pack or a GGUF file holds: model, shapes, size, files. A GGUF file is not packed for it.

    Weights are not read; see `flashrt verify`.

    Example: flashrt inspect ./qwen-int4
    """
    from flashrt.checkpoints.resolve import resolve
    from flashrt.storage.names import default_cache
    from flashrt.storage.pack import Pack

    with Progress() as progress:
        path = resolve(pack, cache_dir or default_cache(), dtype.value, progress, outline=True)
    facts = _facts(Pack(path))
    if json:
        emit(facts)
    else:
        _print(facts)


def _facts(pack: Pack) -> dict[str, Any]:
    from flashrt.budget.planner import owner_of
    from flashrt.engine.runtime import kv_codec
    from flashrt.kv.base import KvLimits
    from flashrt.kv.recurrent import RecurrentStore

    spec, layout, manifest = pack.spec, pack.layout, pack.manifest
    owners: dict[str, int] = {}
    for tensor in layout.tensors.values():
        owner = owner_of(spec, tensor)
        owners[owner] = owners.get(owner, 0) + tensor.nbytes
    layer, attention = spec.layers[0], next(iter(spec.attentions.values()), None)
    mixtures = [layer.ffn for layer in spec.layers if layer.ffn.experts]
    ffn = mixtures[0] if mixtures else layer.ffn
    return {
        "path": str(pack.path),
        "name": manifest.name,
        "source": manifest.source,
        "family": spec.family,
        "dtype": manifest.weights,
        "parameters": spec.parameters,
        "bits_per_weight": 8 * sum(owners.values()) / spec.parameters,
        "bytes": layout.nbytes + sum(source.nbytes for source in pack.sources),
        "context": spec.context,
        "vocab": spec.vocab,
        "hidden": spec.hidden,
        "layers": len(spec.layers),
        "attending_layers": len(spec.attentions),
        **{name: getattr(attention, name, 0) for name in _HEADS},
        "head_shapes": [dict(zip(_HEADS, shape, strict=True)) for shape in _head_shapes(spec)],
        "latent": getattr(attention, "rank", 0),
        "neurons": ffn.neurons,
        "experts": ffn.experts,
        "experts_per_token": ffn.experts_per_token,
        "shared_neurons": ffn.shared,
        "mixtures": len(mixtures),
        "state_bytes": sum(RecurrentStore.claim(net, KvLimits(1, 1)) for net in spec.delta_nets.values()),
        "kv_bytes_per_token": spec.kv_bytes_per_token(kv_codec(pack)),
        "weight_bytes": owners,
        "kv_labels": _labels(pack),
        "files": layout.file_bytes | {source.path: source.nbytes for source in pack.sources},
        "hash": manifest.hash,
    }


def _labels(pack: Pack) -> dict[str, Any] | None:
    """What lies beside the pack for --kv sparse."""
    from flashrt.storage.kv_labels import LABELS_FILE, find_labels

    try:
        labels = find_labels(pack)
    except PackError as error:
        return {"unusable": str(error)}
    if labels is None:
        return None
    layers = sum(layer is not None for layer in labels.layers)
    nbytes = (pack.path / LABELS_FILE).stat().st_size
    return {"bytes": nbytes, "layers": layers, "block": labels.block, "losses": dict(labels.losses)}


def _of_labels(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "none; `flashrt calibrate PACK --kv` makes them for --kv sparse"
    if "unusable" in labels:
        return str(labels["unusable"])
    losses = ", ".join(f"{loss:+.2%} at {keep}" for keep, loss in labels["losses"].items())
    return f"{size(labels['bytes'])}, of {labels['layers']} layers; perplexity {losses or 'not measured'}"


def _head_shapes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """The distinct numbers of `_HEADS` of layers, in the order of these."""
    return list(dict.fromkeys((a.heads, a.kv_heads, a.head_dim) for a in spec.attentions.values()))


def _states(facts: dict[str, Any]) -> dict[str, str]:
    """A line on recurrent layers, where there are any."""
    recurrent = facts["layers"] - facts["attending_layers"]
    return {"states": f"{size(facts['state_bytes'])} of {recurrent} recurrent layers"} if recurrent else {}


def _of_attention(facts: dict[str, Any]) -> str:
    if rank := facts["latent"]:
        return f"{facts['heads']} heads over latents of {rank} numbers and {facts['head_dim'] - rank} rotated ones"
    shapes = [f"{own['heads']} heads, {own['kv_heads']} KV heads of {own['head_dim']}" for own in facts["head_shapes"]]
    return "; ".join(shapes) or "none"


def _of_experts(facts: dict[str, Any]) -> str:
    shared = f", and one of {facts['shared_neurons']} for all" if facts["shared_neurons"] else ""
    some = "" if facts["mixtures"] == facts["layers"] else f" in {facts['mixtures']} layers"
    return f", {facts['experts']} experts ({facts['experts_per_token']} per token{shared}){some}"


def _print(facts: dict[str, Any]) -> None:
    experts = _of_experts(facts) if facts["experts"] else ""
    bits = f"{facts['bits_per_weight']:.2f} bits each"
    rows = {
        "model": f"{facts['name']} ({facts['family']})",
        "source": facts["source"],
        "weights": f"{facts['parameters'] / 1e9:.3f} billion as {facts['dtype']}, {bits}",
        "layers": f"{facts['layers']} of {facts['neurons']} neurons{experts}, hidden size {facts['hidden']}",
        "attention": _of_attention(facts),
        "KV": f"{size(facts['kv_bytes_per_token'])} per token",
        **_states(facts),
        "labels": "none: latents have none" if facts["latent"] else _of_labels(facts["kv_labels"]),
        "vocabulary": str(facts["vocab"]),
        "context": f"{facts['context']} tokens",
        "size": f"{size(facts['bytes'])} in {len(facts['files'])} files",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    parts = table("weights of", "size", "share")
    total = sum(facts["weight_bytes"].values())
    for owner, nbytes in sorted(facts["weight_bytes"].items(), key=lambda item: -item[1]):
        parts.add_row(owner, size(nbytes), f"{nbytes / total:.1%}")
    show(parts)
