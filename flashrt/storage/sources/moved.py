"""What is known of a checkpoint whose files are deleted as they are packed, kept beside the unfinished pack.

Names, places and shapes of its tensors, and of its files size and time: with these it opens though files are gone. It
is written before the first of them goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashrt.arch import Part
from flashrt.errors import CheckpointError, UsageError
from flashrt.spec import ModelSpec
from flashrt.storage.atomic import write_atomically
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.decoding import Codec
from flashrt.storage.sources.quantized.registry import model_tensors
from flashrt.storage.sources.quantized.weights import QuantizedTensor
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor, stored_tensor
from flashrt.storage.sources.tensors import TensorReader
from flashrt.text.files import TextFiles

RECORD = "moving.json"

Parts = list[dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class SavedMap:
    """The names that a checkpoint resolved, by logical key; see `flashrt.arch.names.TensorMap`."""

    named: Mapping[str, Parts]
    head: str
    harmless: frozenset[str] = field(default_factory=frozenset)

    def parts(self, key: str) -> tuple[Part, ...]:
        return tuple(part for part in self._of(key) if part is not None)

    def neurons(self, key: str, run: int) -> tuple[Part | None, Part, Part]:
        gate, up, down = self._of(f"{key}.{run}")
        assert up is not None
        assert down is not None
        return gate, up, down

    def is_harmless(self, tensor: str) -> bool:
        return tensor in self.harmless

    def _of(self, key: str) -> Iterator[Part | None]:
        for saved in self.named[key]:
            if saved is None:
                yield None
            else:
                pairs = {name: tuple(saved[name]) for name in ("rows", "groups") if saved.get(name) is not None}
                yield Part(**{**saved, **pairs})


def save(checkpoint: Checkpoint, where: Path, out: Path) -> None:
    """Write the record of `checkpoint`, which was opened at `where`, into the directory of its pack."""
    reader, names = checkpoint.reader, checkpoint.names
    files = {str(path): _identity(path) for path in sorted(reader.paths) if path.exists()}
    record = {
        "where": str(where.resolve()),
        "spec": checkpoint.spec.to_json(),
        "name": checkpoint.name,
        "source": checkpoint.source,
        "fingerprint": checkpoint.fingerprint,
        "files": files,
        "tensors": {t.name: [t.shape, t.dtype, str(t.path), t.offset, t.nbytes] for t in _stored(reader)},
        "quantization": checkpoint.quantization,
        "kept": {t.name: t.kept for t in reader.tensors.values() if isinstance(t, QuantizedTensor) and t.kept},
        "parts": {key: [_saved(part) for part in parts] for key, parts in checkpoint.all_parts()},
        "head": names.head,
        "harmless": [name for name in reader.tensors if checkpoint.is_harmless(name)],
    }
    write_atomically(out / RECORD, json.dumps(record).encode())


def reopen(out: Path, where: Path) -> Checkpoint | None:
    """The checkpoint that an interrupted job has begun to move into `out`; None when it has not.

    Raises UsageError when that was another checkpoint than the one at `where`, CheckpointError when one of its files
    has changed since.
    """
    path = out / RECORD
    try:
        return _reopened(json.loads(path.read_bytes()), out, where) if path.exists() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, and nothing else says what was moved: {error!r}") from None


def _reopened(record: dict[str, Any], out: Path, where: Path) -> Checkpoint:
    if record["where"] != str(where.resolve()):
        raise UsageError(f"{out} holds a pack into which {record['where']} is being moved: name that checkpoint")
    for name, identity in record["files"].items():
        if (path := Path(name)).exists() and _identity(path) != identity:
            raise CheckpointError(f"{path} has changed since it was begun to be packed into {out}")
    stored = {name: _tensor(name, *entry) for name, entry in record["tensors"].items()}
    return Checkpoint(
        spec=ModelSpec.from_json(record["spec"]),
        name=record["name"],
        source=record["source"],
        fingerprint=record["fingerprint"],
        reader=TensorReader(model_tensors(record["quantization"], stored, record["kept"])),
        quantization=record["quantization"],
        tensor_map=SavedMap(record["parts"], record["head"], frozenset(record["harmless"])),
        text=lambda: TextFiles.from_files(out),
    )


def _stored(reader: TensorReader) -> Iterator[StoredTensor]:
    """Every tensor of the files, those that a quantized matrix is computed from included."""
    for tensor in reader.tensors.values():
        yield from tensor.weights.members if isinstance(tensor, QuantizedTensor) else (tensor,)


def _saved(part: Part | None) -> dict[str, Any] | None:
    return None if part is None else asdict(part)


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _tensor(name: str, shape: list[int], dtype: str, path: str, offset: int, nbytes: int) -> StoredTensor:
    return stored_tensor(name, tuple(shape), dtype, _codec(dtype), Path(path), offset, nbytes)


def _codec(dtype: str) -> Codec | None:
    if dtype in PLAIN_CODECS:
        return PLAIN_CODECS[dtype]
    from gguf.constants import GGMLQuantizationType

    from flashrt.storage.sources.gguf_header import gguf_codec

    return gguf_codec(GGMLQuantizationType[dtype])[1] if dtype in GGMLQuantizationType.__members__ else None
