"""flashrt runs language models that do not fit in memory, under a hard memory budget.

with flashrt.load("demo", budget_gb=1) as engine:
    generation = engine.generate("def fibonacci(n):", max_new_tokens=64)
    for token in generation:
        print(token.text, end="", flush=True)
    print(generation.report.decode_tok_per_s)
"""

from __future__ import annotations

# Nothing is imported here: `python -m flashrt` runs this before it takes the current directory off the path.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from flashrt.engine.engine import Engine

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    path: str | Path,
    budget_gb: float | None = None,
    *,
    context: int | None = None,
    dtype: str = "auto",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    host_budget_gb: float | None = None,
    mode: str = "exact",
    max_loss: float | None = None,
    speculate: str | int = "auto",
    draft: str | Path | None = None,
    kv: str = "exact",
    kv_dtype: str | None = None,
    kv_keep: str | float | None = None,
    kv_dir: str | Path | None = None,
    rope_scaling: str | None = None,
    experts_used: int | None = None,
    session: str | Path | None = None,
    session_dir: str | Path | None = None,
    session_gb: float | None = None,
) -> Engine:
    """Load a model under a memory budget and return an engine; close it, or use it as a context manager.

    path: a pack, or a checkpoint (Hugging Face directory, GGUF file, hub repository as 'org/name' or
        'org/name:Q4_K_M', 'demo', 'demo-small'), which is packed with `dtype` (f32, bf16, int8, int4, or auto: a
        quantized file as it is, else int8) into `cache_dir` on first use
    budget_gb: GiB that the process (with device='cuda': the GPU memory of the process) may hold; None takes what the
        model needs, or what the machine has
    context: tokens of prompt and answer together; None takes 4096, or less if the model ends earlier
    threads: compute threads, 1 to 1024; None takes one per core
    host_budget_gb: with device='cuda', GiB of host memory
    mode: 'exact' or, after `flashrt calibrate`, 'sparse'
    max_loss: with mode='sparse', refuse a calibration that allows more loss of perplexity (0.02 is 2%)
    speculate: 'off', 'auto', or the most tokens (2 to 16) that a pass verifies; what is generated is the same
    rope_scaling: 'linear:4', 'dynamic:2' or 'yarn:4': support contexts that many times as long as the model was trained
        for, in place of the model's own scaling
    experts_used: of a mixture, experts that a token uses, fewer than the model was trained with: less is read, and
        results are no longer the model's
    draft: the pack of a smaller model with the same tokens, all of which is held in memory to draft for this one
    kv: 'exact' or, after `flashrt calibrate --kv`, 'sparse': decode passes attend to the positions that labels choose
    kv_dtype: how keys and values are held: 'f32', 'bf16', 'int8' or 'int4', which take 53% and 41% of bf16's memory at
        a small loss; None takes bf16, or f32 for a pack of that
    kv_keep: with kv='sparse', the share of positions, such as 1/16 (the default)
    kv_dir: a directory for keys and values that do not fit in memory, in a file that goes with the engine; None takes
        `cache_dir`

    session: a file that `engine.save` wrote: a request with `reuse` goes on from its tokens
    session_dir: a directory that keeps what was computed of prompts and answers, across processes: each request goes on
        from the longest beginning of its prompt that is there
    session_gb: GiB that this directory may take, 16 where None; what was used least recently goes

    Raises a FlashrtError that says what to do: UsageError, before anything is opened, for an option of a wrong type or
    out of range; BudgetError, before anything is loaded, when the budget is too small; DiskError where the disk has no
    room for keys and values; SessionError for a session that is missing, damaged, or of another pack.
    """
    from flashrt.engine.open import load as open_engine
    from flashrt.engine.options import LoadOptions

    options = LoadOptions(
        budget_gb=budget_gb,
        context=context,
        dtype=dtype,
        cache_dir=cache_dir,
        threads=threads,
        device=device,
        host_budget_gb=host_budget_gb,
        mode=mode,
        max_loss=max_loss,
        speculate=speculate,
        draft=draft,
        kv=kv,
        kv_dtype=kv_dtype,
        kv_keep=kv_keep,
        kv_dir=kv_dir,
        rope_scaling=rope_scaling,
        experts_used=experts_used,
        session=session,
        session_dir=session_dir,
        session_gb=session_gb,
    )
    return open_engine(path, options)
