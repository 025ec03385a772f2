"""A spec says enough: a plain forward pass over logical tensors gives transformers' logits, for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashrt.rope import Rope
from flashrt.spec import Attention, DeltaNet, LatentAttention, ModelSpec
from flashrt.storage.sources import Checkpoint, open_checkpoint
from flashrt_kernels import reference
from tests.families import FAMILIES, FATRELU_THRESHOLD, GGUF_FAMILIES, GGUF_FIELDS, VOCAB, tiny_checkpoint, tiny_gguf

TOKENS = 40  # longer than every window

_ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    f"fatrelu:{FATRELU_THRESHOLD}": lambda x: F.threshold(x, FATRELU_THRESHOLD, 0.0),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class PlainModel:
    """The whole model in float64, nothing cached."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.lengths = self.spec.vectors()
        self.mixers = {LatentAttention: self.latent_attention, Attention: self.attention, DeltaNet: self.delta_net}

    def vector(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.vector(key)).double()

    def matrix(self, key: str, rows: int) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.matrix_rows(key, 0, rows)).double()

    def bias(self, key: str) -> torch.Tensor | float:
        return self.vector(key) if key in self.lengths else 0.0

    def norm_latent(self, x: torch.Tensor, key: str, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.vector(key)

    def norm(self, x: torch.Tensor, key: str) -> torch.Tensor:
        if self.spec.norm == "layer":
            bias = self.vector(f"{key}.bias") if self.spec.norm_bias else None
            return F.layer_norm(x, (self.spec.hidden,), self.vector(key), bias, self.spec.norm_eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.norm_eps) * self.vector(key)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        x = self.matrix("embed", spec.vocab)[tokens] * spec.embed_scale
        if spec.positions:
            x = x + self.matrix("positions", spec.positions)[torch.arange(len(tokens)) + spec.position_offset]
        inputs = self.layer_inputs(tokens, x) if spec.layer_inputs else None
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i in range(len(spec.layers)):
            before = x
            mixer = spec.layers[i].mixer
            mix = next(mix for kind, mix in self.mixers.items() if isinstance(mixer, kind))
            y = mix(i, self.norm(x, f"{i}.norm.attention") if spec.pre_norms else x)
            x = x + self.given(f"{i}.norm.attention_post", y)
            if spec.parallel:
                y = self.ffn(i, self.norm(before, f"{i}.norm.attention"), before)
            else:
                y = self.ffn(i, self.norm(x, f"{i}.norm.ffn") if spec.pre_norms else x, x)
            x = x + self.given(f"{i}.norm.ffn_post", y)
            if inputs is not None:
                gate = x @ self.matrix(f"{i}.input_gate", spec.layer_inputs).T
                own = _ACTIVATIONS[spec.layers[i].ffn.activation](gate) * inputs[:, i]
                x = x + self.norm(own @ self.matrix(f"{i}.input_out", spec.hidden).T, f"{i}.norm.input_post")
            x = x * self.vector(f"{i}.scale") if spec.layer_scales else x
        logits = self.norm(x, "norm.final") @ self.matrix(spec.head, spec.vocab).T * spec.logit_scale
        return (logits / spec.logit_softcap).tanh() * spec.logit_softcap if spec.logit_softcap else logits

    def layer_inputs(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, layers, layer_inputs]"""
        count, width = len(self.spec.layers), self.spec.layer_inputs
        projected = x @ self.matrix("inputs.project", count * width).T * self.spec.hidden**-0.5
        rows = self.matrix("inputs.embed", self.spec.vocab)[tokens] * self.spec.layer_input_scale
        normed = self.norm(projected.view(-1, count, width), "norm.inputs")
        return (normed + rows.view(-1, count, width)) * 2**-0.5

    def given(self, key: str, y: torch.Tensor) -> torch.Tensor:
        return (self.norm(y, key) if self.spec.post_norms else y) * self.spec.residual_scale

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        a: Attention = self.spec.layers[i].attention
        qkv = x @ self.matrix(f"{i}.qkv", a.qkv_rows).T + self.bias(f"{i}.qkv.bias")
        parts = [rows // a.head_dim for rows in a.qkv_parts]
        q, k, v = qkv.view(len(x), -1, a.head_dim).transpose(0, 1).split(parts)
        v = k if a.keys_as_values else v
        v = self.unit(v) if a.value_norm else v
        if a.qk_norm_whole:
            q, k = (self.norm_whole(t, f"{i}.{name}_norm") for t, name in ((q, "q"), (k, "k")))
        elif a.qk_norm:
            q, k = self.norm(q, f"{i}.q_norm"), k if a.kv_from is not None else self.norm(k, f"{i}.k_norm")
        if a.rope:
            q, k = rotate(q, a.rope), rotate(k, a.rope)
        if a.qk_unit:
            q, k = self.unit(q), self.unit(k)
        if a.kv_from is None:
            self.kept[i] = k, v
        k, v = (t.repeat_interleave(a.heads // a.kv_heads, 0) for t in self.kept[self.spec.kv_layer(i)])
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
        seen = (distance >= 0) & (distance < (a.window or len(x)))
        if a.temperature:
            steps = (torch.arange(len(x)) + a.temperature_first) // a.temperature_span
            q = q * (1 + a.temperature * torch.log1p(steps))[:, None]
        scores = q @ k.transpose(1, 2) * a.scale
        scores = (scores / a.softcap).tanh() * a.softcap if a.softcap else scores
        scores = scores.masked_fill(~seen, -torch.inf)
        if a.sinks:
            sinks = self.vector(f"{i}.sinks")[:, None, None].expand(-1, len(x), 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        joined = (weights @ v).transpose(0, 1).reshape(len(x), -1)
        if a.output_gate:
            joined = joined * (x @ self.matrix(f"{i}.gate", a.width).T).sigmoid()
        return joined @ self.matrix(f"{i}.out", self.spec.hidden).T + self.bias(f"{i}.out.bias")

    def latent_attention(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """As the paper writes it: keys and values of every head."""
        a = self.spec.layers[i].mixer
        assert isinstance(a, LatentAttention)
        assert a.rope is not None
        given, name = x, "queries"
        if a.query_rank:
            given, name = x @ self.matrix(f"{i}.q_a", a.query_rank).T, "q_b"
            given = self.norm_latent(given, f"{i}.q_a_norm", a.latent_eps)
        q = (given @ self.matrix(f"{i}.{name}", a.heads * a.query_dim).T).view(len(x), a.heads, -1).transpose(0, 1)
        latent, key = (x @ self.matrix(f"{i}.kv_a", a.head_dim).T).split([a.rank, a.rope.dims], 1)
        latent = self.norm_latent(latent, f"{i}.kv_a_norm", a.latent_eps)
        up_keys = self.matrix(f"{i}.k_b", a.heads * a.rank).view(a.heads, a.rank, a.nope_dim)
        up_values = self.matrix(f"{i}.v_b", a.width).view(a.heads, a.value_dim, a.rank)
        plain, rotated = q.split([a.nope_dim, a.rope.dims], 2)
        whole = replace(a.rope, dims=0)
        scores = plain @ (latent @ up_keys).transpose(1, 2)
        scores = (scores + rotate(rotated, whole) @ rotate(key[None], whole)[0].T) * a.scale
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        joined = (weights @ (latent @ up_values.transpose(1, 2))).transpose(0, 1).reshape(len(x), -1)
        return joined @ self.matrix(f"{i}.out", self.spec.hidden).T

    def delta_net(self, i: int, x: torch.Tensor) -> torch.Tensor:
        net = self.spec.delta_nets[i]
        beta, decay = (x @ self.matrix(f"{i}.{name}", net.heads).T for name in ("beta", "decay"))
        state = torch.zeros(net.heads, net.key_dim, net.value_dim).double()
        tail = torch.zeros(net.taps - 1, net.channels).double()
        joined = torch.empty(len(x), net.width).double()
        taps = self.vector(f"{i}.taps").view(net.taps, net.channels)
        rate, bias = self.vector(f"{i}.decay.rate"), self.vector(f"{i}.decay.bias")
        rows, gates = x @ self.matrix(f"{i}.qkv", net.channels).T, torch.cat((beta, decay), 1)
        reference.delta_rule(rows, gates, taps, rate, bias, net.tiled, state, tail, joined, len(x))
        heads = joined.view(len(x), net.heads, net.value_dim)
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        gate = F.silu(x @ self.matrix(f"{i}.gate", net.width).T)
        joined = (normed * self.vector(f"{i}.head_norm")).flatten(1) * gate
        return joined @ self.matrix(f"{i}.out", self.spec.hidden).T

    def unit(self, heads: torch.Tensor) -> torch.Tensor:
        return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.spec.norm_eps)

    def norm_whole(self, heads: torch.Tensor, key: str) -> torch.Tensor:
        joined = heads.transpose(0, 1).flatten(1)
        return self.norm(joined, key).view(len(joined), len(heads), -1).transpose(0, 1)

    def ffn(self, i: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        ffn = self.spec.layers[i].ffn
        if not ffn.experts:
            return self.block(i, f"{i}.ffn", 0, x)
        weights, chosen = self.route(i, self.norm(residual, f"{i}.norm.router") if ffn.router_norm else x)
        given = self.norm(residual, f"{i}.norm.experts") if ffn.branch_norms else x
        given = given * weights if ffn.router_input else given
        weights = torch.ones_like(weights) if ffn.router_input else weights
        outputs = torch.stack([self.block(i, f"{i}.ffn", e, given) for e in range(ffn.experts)], 1)
        y = (outputs.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])) * weights[..., None]).sum(1)
        if ffn.branch_norms:
            shared = self.norm(self.block(i, f"{i}.shared", 0, x), f"{i}.norm.shared_post")
            return self.norm(y, f"{i}.norm.experts_post") + shared
        if not ffn.shared:
            return y
        weight = (x @ self.matrix(f"{i}.shared_gate", 1).T).sigmoid() if ffn.shared_gate else 1.0
        return y + weight * self.block(i, f"{i}.shared", 0, x)

    def route(self, i: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ffn = self.spec.layers[i].ffn
        logits = x @ self.matrix(f"{i}.router", ffn.experts).T + self.bias(f"{i}.router.bias")
        logits = logits * ffn.router_logit_scale
        scores = logits.sigmoid() if ffn.router_scores == "sigmoid" else logits.softmax(-1)
        worth = scores + self.bias(f"{i}.router.correction")
        groups = worth.unflatten(1, (ffn.router_groups, -1))
        best = (
            groups.topk(min(ffn.router_group_best, groups.shape[2])).values.sum(-1).topk(ffn.router_groups_used).indices
        )
        used = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
        chosen = groups.masked_fill(~used[..., None], -torch.inf).flatten(1).topk(ffn.experts_per_token).indices
        weights = scores.gather(1, chosen)
        if ffn.normalize_router:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * self.vector(f"{i}.router.scales")[chosen] if ffn.expert_scales else weights
        return weights * ffn.router_scale, chosen

    def block(self, i: int, key: str, run: int, x: torch.Tensor) -> torch.Tensor:
        ffn = self.spec.layers[i].ffn
        gate, up, down = self.checkpoint.neuron_rows(key, run, 0, self.spec.layer_neurons(i)[key][1])
        y = x @ torch.from_numpy(up).double().T + self.bias_of(f"{i}.up.bias", run, len(up))
        if gate is None:
            y = _ACTIVATIONS[ffn.activation](y)
        else:
            g = x @ torch.from_numpy(gate).double().T + self.bias_of(f"{i}.gate.bias", run, len(gate))
            y = glu(g, y, ffn.activation)
        return y @ torch.from_numpy(down).double() + self.bias_of(f"{i}.down.bias", run, self.spec.hidden)

    def bias_of(self, key: str, run: int, width: int) -> torch.Tensor | float:
        """That of one expert."""
        return self.vector(key)[run * width : (run + 1) * width] if key in self.lengths else 0.0


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if activation in _ACTIVATIONS:
        return _ACTIVATIONS[activation](gate) * up
    name, alpha, limit = activation.split(":")
    assert name == "clamped_swiglu"
    gate, up = gate.clamp(max=float(limit)), up.clamp(-float(limit), float(limit))
    return gate * torch.sigmoid(gate * float(alpha)) * (up + 1)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    width = rope.width(x.shape[-1])
    x, rest = x[..., :width], x[..., width:]
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor(rope.inverse_frequencies(x.shape[-1])).double()
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rms_ratio(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def check(checkpoint: Checkpoint, model: Any, tolerance: float = 1e-5) -> None:
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, TOKENS))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].double()
    assert rms_ratio(PlainModel(checkpoint).logits(tokens), expected) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_directory_gives_transformers_logits(family: str, tmp_path: Path) -> None:
    model, directory = tiny_checkpoint(family, tmp_path, seed=1)
    with open_checkpoint(directory) as checkpoint:
        check(checkpoint, model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "mixtral"])
def test_bfloat16_directory_gives_transformers_logits(family: str, tmp_path: Path) -> None:
    model, directory = tiny_checkpoint(family, tmp_path, seed=1, dtype=torch.bfloat16)
    with open_checkpoint(directory) as checkpoint:
        check(checkpoint, model)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_gives_transformers_logits(family: str, tmp_path: Path) -> None:
    model, path = tiny_gguf(family, tmp_path / "tiny.gguf", seed=2, **GGUF_FIELDS.get(family, {}))
    with open_checkpoint(path) as checkpoint:
        check(checkpoint, model)


def test_a_changed_window_would_be_noticed(tmp_path: Path) -> None:
    model, directory = tiny_checkpoint("mistral", tmp_path, seed=1)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"sliding_window": 7', '"sliding_window": 8'))
    with open_checkpoint(directory) as checkpoint, pytest.raises(AssertionError):
        check(checkpoint, model)


def test_specs_survive_json(tmp_path: Path) -> None:
    for family in ("gemma3", "qwen3_moe", "llama-yarn", "opt", "deepseek_v3"):
        _, directory = tiny_checkpoint(family, tmp_path / family)
        with open_checkpoint(directory) as checkpoint:
            assert ModelSpec.from_json(checkpoint.spec.to_json()) == checkpoint.spec
