"""manifest.json: the one file that says what a pack holds, where, and with which checksums.

Everything in it is checked before it is used: a pack may come from anywhere, and a manifest with absurd sizes, or with
paths that leave the directory, must end in one clear message. Positions are not taken from the manifest: they follow
from the spec, the dtype and the block size (`pack_layout`), and the manifest only has to agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from flashrt.errors import PackError
from flashrt.rope import MAX_CONTEXT, Rope
from flashrt.sparsity import VERSION as CALIBRATION
from flashrt.sparsity import Sparsity, gives_zeros
from flashrt.spec import MAX_LAYERS, MOST_EXPERTS, Attention, LatentAttention, ModelSpec
from flashrt.storage.kept import Kept
from flashrt.storage.layout import BLOCK_BYTES, PackLayout, heads_apart, pack_layout
from flashrt.storage.places import Places, file_layout
from flashrt_kernels import activations
from flashrt_kernels.rows import Codec

FORMAT = "flashrt-pack"
DAMAGE = (  # what values of any kind in any place may raise
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
)
VERSION = 2
KEPT_VERSION = 3  # of packs that keep codecs of a file: what reads version 2 alone must not take them for damaged
OUTLINE_VERSION = 5  # of outlines, whose weights lie in the file itself
MANIFEST_FILE = "manifest.json"
SPARSE_DIR = "sparse"  # in a pack: the calibrated one made of it
MAX_MANIFEST_BYTES = 16 << 20  # of blocks of 1 MiB: those of 2 TB
TEXT_FILES = ("tokenizer.json", "text.json")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data file: size, SHA-256, CRC-32 of its header, and CRC-32 of each tensor's blocks and of the vectors."""

    nbytes: int
    sha256: str
    header_crc32: int
    blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensor → CRC-32 of each block
    vectors_crc32: int = 0

    def to_json(self) -> dict[str, Any]:
        blocks = {name: "".join(f"{crc:08x}" for crc in crcs) for name, crcs in self.blocks.items()}
        return {
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "header_crc32": self.header_crc32,
            "blocks_crc32": blocks,
            "vectors_crc32": self.vectors_crc32,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FileEntry:
        blocks = {}
        for name, text in data["blocks_crc32"].items():
            blocks[name] = tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))
        return cls(
            int(data["bytes"]), str(data["sha256"]), int(data["header_crc32"]), blocks, int(data["vectors_crc32"])
        )


@dataclass(frozen=True)
class Manifest:
    """What a pack holds. `text_files` maps the names in TEXT_FILES to their SHA-256."""

    name: str
    source: str
    fingerprint: str
    dtype: Codec
    spec: ModelSpec
    files: dict[str, FileEntry]
    text_files: dict[str, str]
    block_bytes: int = BLOCK_BYTES
    sparsity: Sparsity | None = None  # of a calibrated pack
    kept: Kept | None = None  # what has not `dtype`, but the codecs of the file that was packed
    places: Places | None = None  # of an outline: where the file that it is of has weights

    @property
    def version(self) -> int:
        """Of the format."""
        if self.places is not None:
            return OUTLINE_VERSION
        return VERSION if self.kept is None else KEPT_VERSION

    @property
    def weights(self) -> str:
        """How weights are stored, for people: the dtype, or the codecs of the file."""
        kept = [] if self.kept is None else self.kept.codecs
        return "/".join(codec.value for codec in kept or [self.dtype])

    @functools.cached_property
    def layout(self) -> PackLayout:
        """Where everything lies, worked out once."""
        return self.packed if self.places is None else file_layout(self.packed, self.places, self.block_bytes)

    @functools.cached_property
    def packed(self) -> PackLayout:
        """The layout of the pack: of an outline, of the one that would be made of its files."""
        return pack_layout(self.spec, self.dtype, self.block_bytes, self.sparsity, self.kept)

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "version": self.version,
            "name": self.name,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype.value,
            "block_bytes": self.block_bytes,
            "spec": self.spec.to_json(),
            "text_files": self.text_files,
            "files": {name: entry.to_json() for name, entry in self.files.items()},
        }
        if self.sparsity is not None:
            body["sparsity"] = self.sparsity.to_json()
        if self.kept is not None:
            body["kept"] = self.kept.to_json()
        if self.places is not None:
            body["places"] = self.places.to_json()
        body["checksum"] = _checksum(body)
        return json.dumps(body, indent=1).encode() + b"\n"

    @property
    def hash(self) -> str:
        """Identity of the pack's contents: artefacts made for one pack are bound to it."""
        return str(json.loads(self.to_bytes())["checksum"])

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Parse and check. Raises PackError, naming `where`."""
        try:
            body = json.loads(raw)
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise PackError(f"{where} is not the manifest of a flashrt pack")
            if body.get("version") not in (VERSION, KEPT_VERSION, OUTLINE_VERSION):
                raise PackError(
                    f"{where} has format version {body.get('version')!r}, this flashrt reads versions {VERSION}, "
                    f"{KEPT_VERSION} and {OUTLINE_VERSION}: "
                    "pack the checkpoint again, or use the flashrt that wrote it"
                )
            if body.pop("checksum", None) != _checksum(body):
                raise PackError(f"{where} is damaged: its checksum does not match. Pack the checkpoint again")
            if "sparsity" in body and body["sparsity"].get("version") != CALIBRATION:
                raise PackError(
                    f"{where} was calibrated by version {body['sparsity'].get('version')!r} of the calibration, this "
                    f"flashrt reads version {CALIBRATION}: run `flashrt calibrate` again"
                )
            manifest = cls._from_body(body, where)
            manifest._check(where)
            return manifest
        except PackError:
            raise
        except DAMAGE as error:
            raise PackError(
                f"{where} is damaged ({type(error).__name__}: {error}). Pack the checkpoint again"
            ) from None

    @classmethod
    def _from_body(cls, body: dict[str, Any], where: str) -> Manifest:
        return cls(
            name=str(body["name"]),
            source=str(body["source"]),
            fingerprint=str(body["fingerprint"]),
            dtype=Codec(body["dtype"]),
            spec=ModelSpec.from_json(body["spec"]),
            files={name: FileEntry.from_json(entry) for name, entry in body["files"].items()},
            text_files={str(k): str(v) for k, v in body["text_files"].items()},
            block_bytes=body["block_bytes"],
            sparsity=Sparsity.from_json(body["sparsity"]) if "sparsity" in body else None,
            kept=Kept.from_json(body["kept"], where) if body["version"] != VERSION else None,
            places=Places.from_json(body["places"]) if body["version"] == OUTLINE_VERSION else None,
        )

    def _check(self, where: str) -> None:
        _check_spec(self.spec, where)
        if not isinstance(self.block_bytes, int) or not 0 < self.block_bytes <= 1 << 30:
            raise PackError(f"{where}: block_bytes is {self.block_bytes!r}, expected 1 to 2**30")
        if self.sparsity is not None:
            _check_sparsity(self.sparsity, self.spec, self.dtype, where)
        if self.kept is not None and (problem := self.kept.problem(self.spec)):
            raise PackError(f"{where}: {problem}")
        if self.kept is not None and self.sparsity is not None:
            raise PackError(f"{where}: a calibrated pack that keeps codecs of a file, which are not calibrated")
        unknown = set(self.text_files) - set(TEXT_FILES)
        if unknown:
            raise PackError(f"{where}: unexpected text files {sorted(unknown)}")
        if self.places is not None and (problem := self.places.problem(self.packed)):
            raise PackError(f"{where}: {problem}")
        layout = self.layout
        if set(self.files) != set(layout.file_bytes):
            odd = sorted(set(self.files) ^ set(layout.file_bytes))[:3]
            raise PackError(f"{where}: the files listed are not those of this model ({', '.join(odd)} ...)")
        for name, entry in self.files.items():
            if entry.nbytes != layout.file_bytes[name]:
                raise PackError(
                    f"{where}: {name} is listed with {entry.nbytes} bytes, expected {layout.file_bytes[name]}"
                )
            expected = {tensor.name: tensor.blocks for tensor in layout.tensors_of(name)}
            if {tensor: len(crcs) for tensor, crcs in entry.blocks.items()} != expected:
                raise PackError(f"{where}: the block checksums of {name} do not match its tensors")


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_spec(spec: ModelSpec, where: str) -> None:
    """Refuse shapes that no model has, before anything is sized by them."""

    bounded = functools.partial(_bounded, where=where)
    _check_fields(spec, where)
    bounded("vocab", spec.vocab, 1, 1 << 24)
    bounded("hidden", spec.hidden, 1, 1 << 20)
    bounded("context", spec.context, 1, MAX_CONTEXT)
    bounded("positions", spec.positions, 0, 1 << 31)
    bounded("layer_inputs", spec.layer_inputs, 0, 1 << 16)
    bounded("position_offset", spec.position_offset, 0, spec.positions)
    bounded("layers", len(spec.layers), 1, MAX_LAYERS)
    for token in (*spec.eos, *([] if spec.bos is None else [spec.bos])):
        bounded("a BOS or EOS token", token, 0, 1 << 24)
    if spec.norm not in ("rms", "layer"):
        raise PackError(f"{where}: unknown norm {spec.norm!r}")
    for layer in set(spec.layers):
        mixer, ffn = layer.mixer, layer.ffn
        _check_fields(mixer, where)
        _check_fields(ffn, where)
        if isinstance(mixer, Attention):
            _check_attention(mixer, where)
            if isinstance(mixer, LatentAttention):
                for name in ("rank", "nope_dim", "value_dim"):
                    _bounded(name, getattr(mixer, name), 1, 1 << 14, where)
                _bounded("query_rank", mixer.query_rank, 0, 1 << 16, where)
        else:
            for name in ("key_heads", "heads", "key_dim", "value_dim", "taps"):
                _bounded(name, getattr(mixer, name), 1, 1 << 14, where)
        bounded("neurons", ffn.neurons, 1, 1 << 22)
        bounded("experts", ffn.experts, 0, MOST_EXPERTS)
        bounded("experts_per_token", ffn.experts_per_token, 1 if ffn.experts else 0, ffn.experts)
        bounded("router_groups", ffn.router_groups, 1, 1 << 14)
        bounded("router_groups_used", ffn.router_groups_used, 1, ffn.router_groups)
        bounded("router_group_best", ffn.router_group_best, 1, 1 << 14)
        bounded("shared", ffn.shared, 0, 1 << 22)
        try:
            activations.parse(ffn.activation)
        except ValueError as error:
            raise PackError(f"{where}: {error}") from None
    if problem := spec.unsupported():
        raise PackError(f"{where}: {problem}")
    for rope, head_dim in {(attention.rope, attention.head_dim) for attention in spec.attentions.values()}:
        if rope is not None:
            _check_rope(rope, head_dim, spec.context, where)


def _check_attention(attention: Attention, where: str) -> None:
    _bounded("heads", attention.heads, 1, 1 << 14, where)
    _bounded("kv_heads", attention.kv_heads, 1, attention.heads, where)
    _bounded("head_dim", attention.head_dim, 1, 1 << 14, where)
    if attention.heads % attention.kv_heads:
        raise PackError(f"{where}: {attention.heads} heads do not share {attention.kv_heads} KV heads evenly")
    if attention.kv_from is not None:
        _bounded("kv_from", attention.kv_from, 0, MAX_LAYERS, where)
    if attention.window is not None:
        _bounded("window", attention.window, 1, 1 << 31, where)


def _bounded(name: str, value: object, low: int, high: int, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise PackError(f"{where}: {name} is {value!r}, expected a whole number from {low} to {high}")


def _check_sparsity(sparsity: Sparsity, spec: ModelSpec, dtype: Codec, where: str) -> None:
    if len(sparsity.layers) != len(spec.layers):
        raise PackError(f"{where}: a calibration of {len(sparsity.layers)} layers, the model has {len(spec.layers)}")
    if any(layer.ffn.experts for layer in spec.layers):
        raise PackError(f"{where}: a calibrated mixture of experts; only dense models are calibrated")
    if spec.delta_nets:
        raise PackError(f"{where}: a calibrated model with recurrent layers, which are not calibrated")
    if spec.latent:
        raise PackError(f"{where}: a calibrated model with latent attention, which is not calibrated")
    if not all(activations.parse(layer.ffn.activation).gate_only for layer in spec.layers):
        raise PackError(f"{where}: a calibration of neurons whose activation bounds what the gate is multiplied by")
    if any(layer.ffn.gate_bias for layer in spec.layers):
        raise PackError(f"{where}: a calibration of neurons whose gates have biases, which are not calibrated")
    if sparsity.channels and dtype is not Codec.INT4:
        raise PackError(f"{where}: weights stored by channel in {dtype.value}, expected int4")
    if sparsity.rows and not all(gives_zeros(layer.ffn.activation) for layer in spec.layers):
        raise PackError(f"{where}: neurons are predicted of an activation that is never zero")
    for found, layer in zip(sparsity.rows, spec.layers, strict=False):
        if found.heads_from is not None and not heads_apart(layer.attention):
            raise PackError(f"{where}: heads are predicted of an attention whose heads cannot be computed one by one")


def _check_fields(part: Any, where: str) -> None:
    """Every number of a part of a spec is finite, every switch is true or false."""
    for item in fields(part):
        value = getattr(part, item.name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (item.type == "float" and not number) or (item.type == "bool" and not isinstance(value, bool)):
            raise PackError(f"{where}: {item.name} is {value!r}, expected a {item.type}")


def _check_rope(rope: Rope, head_dim: int, context: int, where: str) -> None:
    _check_fields(rope, where)
    if type(rope.original_context) is not int or not 0 <= rope.original_context <= MAX_CONTEXT:
        raise PackError(f"{where}: original_context is {rope.original_context!r}, expected a whole number")
    if problem := rope.problem(head_dim, context):
        raise PackError(f"{where}: {problem}")
