"""Layers that predict further tokens (multi-token prediction, DeepSeek-V3, arXiv:2412.19437, section 2.2).

Such a layer is given the embedding of a token and the state that the model had before it, each normed, side by side and
projected. It is one of the model's own kind, and ends in a norm of its own and the model's head. Of several only the
first is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flashrt.arch.names import Names, TensorMap
from flashrt.spec import ModelSpec


def ahead_spec(spec: ModelSpec) -> ModelSpec:
    """The layer as a model of its own: like the last of the model that attends, with the last feed-forward block."""
    attention = list(spec.attentions.values())[-1]
    return replace(spec, layers=(replace(spec.layers[-1], mixer=attention),), follows=True, tied=True)


def behind(names: Names, templates: Mapping[str, str], layers: int) -> Names:
    """Names of a layer that is stored as if it came after `layers` others; `templates` are relative to it."""
    prefix = names.layer_prefix.format(i=layers)
    return replace(names, shared={key: prefix + name for key, name in templates.items()}, layer_prefix=prefix)


def ahead_tensors(model: TensorMap) -> TensorMap | None:
    """Where the tensors of the layer lie in a checkpoint whose other tensors are those of `model`; None without one."""
    names, spec = model.names, model.spec
    if spec.follows or (not names.ahead and names.apart is None):
        return None
    own = (names.apart or behind(names, names.ahead, len(spec.layers))).resolve(ahead_spec(spec), model.has)
    return own if model.has(own.parts("join")[0].tensor) else None
