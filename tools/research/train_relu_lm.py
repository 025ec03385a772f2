#!/usr/bin/env python3
"""Train a small OPT with ReLU on text found on this machine, for sparsity that is no accident of random weights.

    OMP_WAIT_POLICY=passive python -m tools.research.train_relu_lm CHECKPOINT --minutes 50
    python -m tools.research.train_relu_lm CHECKPOINT --minutes 1 --hidden 64 --layers 2 --heads 2

CHECKPOINT becomes a Hugging Face directory (`flashrt pack CHECKPOINT PACK`) with held-out.txt and calibration.txt in
it: text of the same kind, from files that training never saw. Without --text-dir the text is Python's library, the
installed packages and /usr/share/doc. Model and batch are larger on a GPU.

Matrices are trained with Muon (orthogonalised momentum; Jordan et al. 2024, its steps scaled to AdamW's as in
arXiv:2502.16982, section 2.2), which takes a fraction of AdamW's tokens to learn as much; embeddings and vectors with
AdamW. The learning rate warms up and then falls linearly over the minutes given; bfloat16 where tensors are multiplied,
gradients clipped to norm 1. An L1 penalty on the activations, raised gradually as in ProSparse (arXiv:2402.13516,
section 3), silences neurons. Its weight is not a constant but follows the share of zeros, which is to reach --zeros at
three fifths of the training. --zeros 0: no penalty.

On a CPU the minutes are processor time per thread, so that a busy machine takes longer and trains as much. Threads that
wait by spinning would count that as training, hence OMP_WAIT_POLICY. The record holds perplexity and bits per
byte of the held-out text beside those of unigrams and bigrams (bits per byte compare across vocabularies, perplexities
do not), and the share of FFN neurons that are zero in each layer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import table
from tools.research.corpus import BETWEEN, Corpus, collect, default_roots

BOUNDARY = "<|endoftext|>"  # stands before every document, and first in every window
TOKENIZER_BYTES = 8 << 20  # of training text that the tokenizer is fitted to
WARM_UP = 0.02  # share of the training in which the learning rate rises
LAST_RATE = 0.02  # of the peak, at the end
DECAY = 0.1  # of weights, relative to the learning rate
PENALTY_RISE = 0.6  # share of the training in which the wanted share of zeros rises
PENALTY_GAIN = 0.2  # of the weight's logarithm per step, for each unit of what is lacking
PENALTY_LEAST = 0.01  # weight, where nothing is lacking
SMOOTHING = (1e-3, 1e-2, 1e-1)  # k of the bigram baseline; the best one counts
REPORT_S = 20.0  # between lines of progress


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    batch: int  # windows of a step


SHAPES = {"cpu": Shape(256, 4, 4, 8), "cuda": Shape(768, 12, 12, 64)}
FFN_RATIO = 12  # neurons per number of the hidden state


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.train_relu_lm", __doc__)
    args = arguments(benchmark, argv)
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = collect(args.text_dir or default_roots(), int(args.megabytes * 1e6))
    tokenizer = fit_tokenizer(corpus.train, args.vocab)
    train, held_out = encode(tokenizer, corpus.train), encode(tokenizer, [BETWEEN.join(corpus.held_out)])[1:]
    say(f"{len(train)} tokens to train on, {len(held_out)} held out; {time.perf_counter() - began:.0f} s")
    if len(train) <= args.context:
        raise SystemExit(f"{len(train)} tokens of text do not fill one window of {args.context}: name more text")
    model = new_model(args, tokenizer)
    seen = fit(model, train, args)
    save(args.checkpoint, model, tokenizer, corpus)
    loss, zeros = evaluate(model, held_out, args)
    unigram, bigram = baselines(train, held_out, tokenizer.get_vocab_size())
    losses = {"": loss, "unigram_": unigram, "bigram_": bigram}
    tokens_per_byte = len(held_out) / len(BETWEEN.join(corpus.held_out).encode())
    figures = {
        **{f"{name}perplexity": math.exp(loss) for name, loss in losses.items()},
        **{f"{name}bits_per_byte": loss / math.log(2) * tokens_per_byte for name, loss in losses.items()},
        "held_out_tokens": len(held_out),
        "train_tokens": len(train),
        "tokens_seen": seen,
        "seconds": time.perf_counter() - began,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    settings = {key: value for key, value in vars(args).items() if key not in ("checkpoint", "out", "text_dir")}
    settings["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    tables = [
        table(["training", ("figure", "number")], figures.items()),
        table(["layer", ("zero activations", "permille")], enumerate(zeros)),
    ]
    benchmark.publish(settings, [figures | {"zero_share": zeros}], {"tables": tables})


def arguments(benchmark: Benchmark, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark.parser
    parser.add_argument("checkpoint", type=Path, help="directory of the checkpoint")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--ffn", type=int, help=f"neurons of a layer; {FFN_RATIO} times the hidden size by default")
    parser.add_argument("--batch", type=int, help="windows of a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, and the most the model takes")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--zeros", type=float, default=0.93, help="share of activations that the L1 penalty aims at")
    parser.add_argument("--text-dir", type=Path, nargs="+", help="where to look for text")
    parser.add_argument("--megabytes", type=float, default=64.0, help="of text, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    args = benchmark.parse(argv)
    shape = SHAPES[args.device]
    for name in Shape.__slots__:
        setattr(args, name, getattr(args, name) or getattr(shape, name))
    args.ffn = args.ffn or FFN_RATIO * args.hidden
    return args


def fit_tokenizer(documents: Sequence[str], vocab: int) -> Tokenizer:
    """A byte-level BPE; encoding with special tokens puts BOUNDARY first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
    )
    sizes = np.cumsum([len(document) for document in documents])
    tokenizer.train_from_iterator(documents[: int(np.searchsorted(sizes, TOKENIZER_BYTES)) + 1], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, tokenizer.token_to_id(BOUNDARY))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """The ids of all documents, int32, each begun by BOUNDARY."""
    ids = [np.asarray(tokenizer.encode(document).ids, np.int32) for document in documents]
    return torch.from_numpy(np.concatenate(ids))


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> OPTForCausalLM:
    boundary = tokenizer.token_to_id(BOUNDARY)
    config = OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        ffn_dim=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=boundary,
        eos_token_id=boundary,
        pad_token_id=None,
    )
    model = OPTForCausalLM(config)
    for layer in model.model.decoder.layers:
        layer.activation_fn = WatchedReLU()
        # Each branch adds nothing at first (Fixup, arXiv:1901.09321), or its noise would drown the small embeddings.
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        torch.nn.init.zeros_(layer.fc2.weight)
    return model.to(args.device)


class WatchedReLU(torch.nn.Module):
    """ReLU that counts its zeros, and pulls on what is not zero as an L1 penalty does."""

    pull = 0.0  # the penalty's weight on the mean activation
    zeros: Tensor  # share of zeros in the last outputs

    def forward(self, x: Tensor) -> Tensor:
        result = torch.relu(x)
        self.zeros = 1 - torch.count_nonzero(result) / result.numel()
        if self.pull and result.requires_grad:
            slope = self.pull / result.numel()
            result.register_hook(lambda gradient: gradient + slope)
        return result


def activations(model: OPTForCausalLM) -> list[WatchedReLU]:
    return [layer.activation_fn for layer in model.model.decoder.layers]


def zero_shares(model: OPTForCausalLM) -> Tensor:
    """The share of zeros of each layer in the last outputs, float32 [layers]."""
    return torch.stack([activation.zeros for activation in activations(model)])


def fit(model: OPTForCausalLM, ids: Tensor, args: argparse.Namespace) -> int:
    """Train for the time given; the number of tokens trained on."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizers, penalty, clock = new_optimizers(model), Penalty(args.zeros), Clock(args.device)
    seen, reported, losses = 0, 0.0, list[Tensor]()
    model.train()
    while (progress := clock.seconds() / (60 * args.minutes)) < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_share(progress)
        for activation in activations(model):
            activation.pull = penalty.weight / args.layers
        batch = windows(ids, args, generator).to(args.device)
        losses.append(step(model, optimizers, batch))
        penalty.follow(progress, float(zero_shares(model).mean()))
        seen += batch.numel()
        if clock.seconds() - reported > REPORT_S:
            reported = clock.seconds()
            line = f"{progress:4.0%}  {seen} tokens, {seen / reported:.0f}/s  loss {torch.stack(losses).mean():.3f}"
            say(f"{line}  zeros {penalty.zeros:.3f}  penalty {penalty.weight:.3g}")
            losses.clear()
    return seen


def step(model: OPTForCausalLM, optimizers: Sequence[torch.optim.Optimizer], batch: Tensor) -> Tensor:
    """Train on one batch of windows; the loss without the penalty."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def new_optimizers(model: OPTForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the others; vectors do not decay."""
    matrices = [p for p in model.model.decoder.layers.parameters() if p.ndim == 2]
    inner = set(map(id, matrices))
    embeddings = [p for p in model.parameters() if p.ndim == 2 and id(p) not in inner]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
    ]


class Clock:
    """Seconds of training: of one thread's processor time on a CPU, of the wall on a GPU."""

    def __init__(self, device: str) -> None:
        self._now = time.perf_counter if device == "cuda" else time.process_time
        self._threads = 1 if device == "cuda" else torch.get_num_threads()
        self._began = self._now()

    def seconds(self) -> float:
        return (self._now() - self._began) / self._threads


def rate_share(progress: float) -> float:
    """Learning rate as a share of its peak: a line up, then a line down."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return LAST_RATE + (1 - LAST_RATE) * (1 - progress) / (1 - WARM_UP)


class Penalty:
    """The weight of the mean activation in the loss, moved step by step by what the share of zeros lacks."""

    def __init__(self, target: float) -> None:
        self.target, self.zeros, self.weight = target, 0.0, PENALTY_LEAST if target else 0.0

    def follow(self, progress: float, zeros: float) -> None:
        """`zeros` is the share of activations that are; the one wanted rises along a sine to the target."""
        self.zeros = zeros
        risen = (1 - math.cos(math.pi * min(progress / PENALTY_RISE, 1.0))) / 2
        if self.target:
            self.weight = max(self.weight * math.exp(PENALTY_GAIN * (self.target * risen - zeros)), PENALTY_LEAST)


def windows(ids: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Random windows int64 [batch, context] of the training text, the first token of each replaced by BOUNDARY."""
    begins = torch.randint(len(ids) - args.context + 1, (args.batch,), generator=generator)
    result = torch.stack([ids[begin : begin + args.context] for begin in begins]).long()
    result[:, 0] = ids[0]
    return result


@torch.no_grad()
def evaluate(model: OPTForCausalLM, ids: Tensor, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Nats per token, in windows that start afresh, and the share of zero activations of each layer. In float32."""
    model.eval()
    step, total = args.context - 1, 0.0
    zeros = torch.zeros(args.layers, dtype=torch.float64)
    boundary = torch.tensor([model.config.bos_token_id])
    for part in ids.long().split(step):
        window = torch.cat((boundary, part))[None].to(args.device)
        total += float(model(input_ids=window, labels=window).loss) * len(part)
        zeros += zero_shares(model).double().cpu() * len(part)
    return total / len(ids), (zeros / len(ids)).tolist()


def baselines(train: Tensor, held_out: Tensor, vocab: int) -> tuple[float, float]:
    """Nats per token of the held-out text by counts of single tokens and of pairs, add-k smoothed.

    k is the best of SMOOTHING on the held-out text itself, which flatters the baseline.
    """
    before, after = held_out[:-1].long(), held_out[1:].long()
    single = torch.bincount(train, minlength=vocab).double()
    pairs, counts = torch.unique(train[:-1].long() * vocab + train[1:], return_counts=True)
    wanted = before * vocab + after
    at = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    found = torch.where(pairs[at] == wanted, counts[at], 0).double()
    unigram = ((single[after] + 1) / (single.sum() + vocab)).log()
    bigrams = [((found + k) / (single[before] + k * vocab)).log() for k in SMOOTHING]
    return -float(unigram.mean()), min(-float(logs.mean()) for logs in bigrams)


def save(out: Path, model: OPTForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """The checkpoint, its tokenizer, and the texts beside it."""
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOUNDARY, "eos_token": BOUNDARY}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for name, documents in (("held-out", corpus.held_out), ("calibration", corpus.calibration)):
        (out / f"{name}.txt").write_text(BETWEEN.join(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
