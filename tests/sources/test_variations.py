"""Two hundred made-up checkpoints against transformers and the gguf package: equal, or refused by name.

FLASHRT_VARIATIONS is the seed: with another one, other checkpoints are tried.
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashrt.errors import FlashrtError
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.gguf_header import read_gguf
from flashrt.storage.sources.text import directory_text
from flashrt.text.gguf import text_from_gguf
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, relative_rms, tiny_engine
from tests.families import VOCAB, tiny_gguf, tiny_model
from tests.variations import a_text, gguf_metadata, model_directory, tokenizer_directory

SEED = int(os.environ.get("FLASHRT_VARIATIONS", "1"))
BATCHES, TOKENIZERS, MODELS, FILES = 4, 25, 14, 12  # of each in a batch
TEXTS = 6


def generator(kind: str, batch: int) -> random.Random:
    return random.Random(f"{SEED} {kind} {batch}")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """What transformers says of odd files is no concern here."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_tokenizers_as_transformers(batch: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    choose, compared = generator("tokenizers", batch), 0
    for i in range(TOKENIZERS):
        what = tokenizer_directory(choose, tmp_path / str(i))
        texts = [a_text(choose) for _ in range(TEXTS)]
        try:
            ours = Tokenizer.from_text(directory_text(tmp_path / str(i), what.split()[0], {}))
        except FlashrtError:
            continue
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(i))
        compared += 1
        for text in texts:
            for special in (True, False):
                expected = theirs.encode(text, add_special_tokens=special)
                assert ours.encode(text, special) == expected, (i, what, text, special)
            for skip in (True, False):
                decoded = theirs.decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(expected, skip) == decoded, (i, what, text, skip)
    assert compared > TOKENIZERS // 2


@pytest.mark.parametrize("batch", range(BATCHES))
def test_models_as_transformers(batch: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    choose, compared = generator("models", batch), 0
    for i in range(MODELS):
        directory = tmp_path / str(i)
        try:
            what = model_directory(choose, directory)
        except Exception:  # nobody's model
            continue
        ids = [choose.randrange(3, VOCAB) for _ in range(24)]
        try:
            packed = make_pack(directory, tmp_path / f"{i}-pack", Codec.F32)
        except FlashrtError:
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        except (TypeError, ValueError):  # transformers builds another class than it says, and fails
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 17:].numpy()
        with tiny_engine(packed, 1.0) as engine:
            assert relative_rms(logits_of(engine, ids[:18], ids[18:]), expected) < 1e-4, (i, what)
        compared += 1
    assert compared > MODELS // 3


@pytest.mark.parametrize("batch", range(BATCHES))
def test_gguf_as_transformers_and_the_gguf_package(batch: int, tmp_path: Path) -> None:
    choose, compared = generator("gguf", batch), 0
    for i in range(FILES):
        family = choose.choice(("llama", "llama-bias", "qwen2", "qwen3"))
        quant = choose.choice(("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"))
        seed, path = choose.randint(0, 99), tmp_path / f"{i}.gguf"
        changed = gguf_metadata(choose, family.partition("-")[0])
        sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128}
        tiny_gguf(family, path, seed, quant, metadata=changed, **sizes)
        what = i, family, quant, changed
        check_text(read_gguf(path).metadata, [a_text(choose, ("<s>", "</s>")) for _ in range(TEXTS)], what)
        ids = [choose.randrange(3, VOCAB) for _ in range(24)]
        expected = gguf_config_of(family, changed)
        try:
            packed = make_pack(path, tmp_path / f"{i}-pack", Codec.F32)
        except FlashrtError:
            continue
        check_tensors(path)
        model = as_stored(tiny_model(family, seed, **sizes, **expected), quant)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, 17:].numpy()
        with tiny_engine(packed, 1.0) as engine:
            assert relative_rms(logits_of(engine, ids[:18], ids[18:]), logits) < 1e-4, what
        compared += 1
    assert compared > 1


def gguf_config_of(family: str, changed: dict[str, Any]) -> dict[str, Any]:
    """What keys of GGUF metadata mean in a configuration of transformers, for those that it can say."""
    values = {key.partition(".")[2]: value for key, value in changed.items()}
    theta = values.get("rope.freq_base", tiny_model(family).config.rope_parameters["rope_theta"])
    kind, factor = values.get("rope.scaling.type", "none"), values.get("rope.scaling.factor", 1.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    context = values.get("context_length", 256)
    if kind != "none":
        rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values.get("rope.scaling.original_context_length", context)
    result = {"rope_parameters": rope, "max_position_embeddings": context}
    if "attention.layer_norm_rms_epsilon" in values:
        result["rms_norm_eps"] = values["attention.layer_norm_rms_epsilon"]
    return result


def as_stored(model: Any, quant: str) -> Any:
    """The model with the values that its GGUF file has, as the gguf package quantizes and reads them."""
    import gguf

    kind = gguf.GGMLQuantizationType[quant]
    with torch.no_grad():
        for parameter in model.parameters():
            if quant != "F32" and parameter.ndim > 1 and parameter.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()))
    return model


def check_text(metadata: dict[str, Any], texts: list[str], what: Any) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    try:
        ours = Tokenizer.from_text(text_from_gguf(metadata))
    except FlashrtError:
        return
    pre = metadata["tokenizer.ggml.pre"]
    if pre not in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", "default"):
        return  # `test_bpe` holds these against llama.cpp's patterns
    names = {"tokens": "tokens", "merges": "merges", "token_type": "token_type"}
    fields = {name: metadata[f"tokenizer.ggml.{key}"] for name, key in names.items()}
    theirs, _ = convert_gguf_tokenizer("llama", {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, **fields})
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    for text in texts:
        if not text.isascii():
            continue  # not in the tiny vocabulary, and composed by Qwen's own tokenizer only
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=False) == expected, (what, text)
        assert ours.encode(text) == [0] * adds_bos + expected + [1] * adds_eos, (what, text)


def check_tensors(path: Path) -> None:
    """Every tensor is read to the bits that the gguf package reads."""
    import gguf

    with open_checkpoint(path) as checkpoint:
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            reader = checkpoint.reader
            found = reader.vector(tensor.name) if len(shape) == 1 else reader.rows(tensor.name, 0, shape[0])
            np.testing.assert_array_equal(found, expected)
