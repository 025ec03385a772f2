#!/usr/bin/env python3
"""What flashrt does on this machine's GPU, in one JSON: the tests marked `gpu`, copies, kernels, runs under budgets.

    make gpu-report          (or: PYTHONPATH=.:kernels python -m tools.benchmarks.gpu_report [--out FILE])

Needs torch, triton, numpy, safetensors, tokenizers, psutil, typer and rich, and pytest for the tests. Nothing is
downloaded, built or installed. The model is one of random weights, made here and removed afterwards: speeds are real,
text is not. Without a GPU it says so and stops.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.benchmarks.harness.facts import ROOT, versions
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.runs import last_json
from tools.benchmarks.harness.samples import Sample, table

GIB = 1 << 30
TESTS_S = 240.0  # the share of the ten minutes that tests may take
TOTAL_S = 560.0
PROMPT_TOKENS = 512
NEW_TOKENS = 32
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers")


def why_not() -> str | None:
    """Why there is nothing to do here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def describe() -> dict[str, Any]:
    """Facts of the GPU."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu`. Only files that hold some are collected: others may need what is not here."""
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed"}
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return {"error": "no test is marked gpu"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # pyproject's options are strict about plugins that may be missing here; so may be the compiled extensions.
        options = ["-m", "gpu", "-ra", "-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors"]
        options.append(f"--junitxml={report}")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, env=environment(), timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"error": f"the tests took more than {seconds:.0f} s"}
        if not report.exists():
            return {"error": f"pytest ended with status {done.returncode}"}
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        return counts | {"status": done.returncode, "seconds": round(float(suite.get("time", 0)), 1)}


def copy_rates(nbytes: int = 256 << 20, repeat: int = 8) -> dict[str, float]:
    """Bytes per second from host to device and back, in pinned and in pageable memory; the best of `repeat`."""
    import torch

    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    rates = {}
    for kind, pinned in (("pinned", True), ("pageable", False)):
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        for direction, target, source in (("h2d", device, host), ("d2h", host, device)):
            best = 0.0
            for _ in range(repeat):
                torch.cuda.synchronize()
                began = time.perf_counter()
                target.copy_(source, non_blocking=pinned)
                torch.cuda.synchronize()
                best = max(best, nbytes / (time.perf_counter() - began))
            rates[f"{direction}_{kind}_bytes_per_s"] = round(best)
    return rates


def kernel_rates() -> list[dict[str, Any]]:
    """Rates of the kernels of the sparse FFN and of sparse attention."""
    if importlib.util.find_spec("triton") is None:
        return [{"error": "triton is not installed"}]
    from tools.benchmarks import gpu_attention, gpu_kernels

    results: list[dict[str, Any]] = []
    for measure in (gpu_kernels.measure, gpu_attention.measure):
        try:
            results += measure()
        except Exception as error:  # a kernel that fails must not take the rest of the report with it
            results.append({"error": f"{type(error).__name__}: {error}"[:2000]})
    return results


def benchmark(deadline: float) -> list[dict[str, Any]]:
    """Speed of a model of random weights: all of it on the GPU, and with half of the weights beyond the budget."""
    from flashrt_kernels.rows import Codec
    from tools.make_synthetic_pack import PRESETS, make

    shape = replace(PRESETS["llama-2-7b"], hidden=2048, layers=12, heads=16, kv_heads=4, neurons=5632)
    results = []
    with tempfile.TemporaryDirectory(prefix="flashrt-gpu-") as folder:
        for codec in (Codec.BF16, Codec.INT4):
            path = Path(folder) / codec.value
            make(path, "synthetic-0.7b", shape, codec)
            resident = run_once(path, None, deadline)
            results.append({"dtype": codec.value, "budget": "resident", **resident})
            if "plan" in resident:
                plan = resident["plan"]
                half = (plan["budget_bytes"] - plan["weight_bytes"] // 2) / GIB
                results.append({"dtype": codec.value, "budget": "half", **run_once(path, half, deadline)})
    return results


def run_once(pack: Path, budget_gb: float | None, deadline: float) -> dict[str, Any]:
    """Figures of one `flashrt run`, in a process of its own: its budget counts all that the process holds."""
    command = [sys.executable, "-m", "flashrt", "run", str(pack), "--device", "cuda", "--json"]
    command += ["--raw", "--prompt", "a" * PROMPT_TOKENS, "--max-new-tokens", str(NEW_TOKENS)]
    if budget_gb is not None:
        command += ["--budget-gb", f"{budget_gb:.4f}"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=max(deadline - time.monotonic(), 1),
        )
    except subprocess.TimeoutExpired:
        return {"error": "out of time"}
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    report = last_json(done.stdout)
    for key in ("text", "token_ids"):  # noise, from noise
        report.pop(key, None)
    return report


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def failed(report: dict[str, Any]) -> bool:
    tests = report["tests"]
    results = report["kernels"] + report["benchmark"]
    return bool(tests.get("status", 1)) or any("error" in result for result in results)


def main(arguments: Sequence[str] | None = None) -> int:
    command = Benchmark("tools.benchmarks.gpu_report", __doc__)
    command.parse(arguments)
    if reason := why_not():
        print(f"no GPU to report on: {reason}. Nothing was done.")
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    began = time.monotonic()
    gpu = describe()
    report = {
        "tests": run_tests(TESTS_S),
        "copies": copy_rates(),
        "kernels": kernel_rates(),
        "benchmark": benchmark(began + TOTAL_S),
    }
    parameters = {"tests": report["tests"], "seconds": round(time.monotonic() - began, 1)}
    command.publish(parameters, samples_of(report), summary(report), machine=gpu, versions=versions(PACKAGES))
    return int(failed(report))


def samples_of(report: dict[str, Any]) -> list[Sample]:
    """Every figure, labelled with the part of the report that it is of."""
    parts = {"copies": [report["copies"]], "kernels": report["kernels"], "benchmark": report["benchmark"]}
    return [{"part": part} | figures for part, found in parts.items() for figures in found]


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """A table of each part; what failed says so in the column of its error."""
    copies = [[name, rate] for name, rate in report["copies"].items()]
    tables = [table(["copies", ("rate", "MB/s")], copies)]
    columns = {
        "kernels": {
            "kernel": "",
            "shape": "",
            "tokens": "",
            "rows": "",
            "context": "",
            "microseconds": "number",
            "bytes_per_s": "MB/s",
            "speedup": "ratio",
            "error": "",
        },
        "benchmark": {"dtype": "", "budget": "", "decode_tok_per_s": "number", "ttft_s": "s", "error": ""},
    }
    for part, units in columns.items():
        rows = [[found.get(name) for name in units] for found in report[part]]
        tables.append(table(list(units.items()), rows))
    tests = ", ".join(f"{name} {value}" for name, value in report["tests"].items())
    return {"text": [f"Tests marked gpu: {tests}."], "tables": tables}


if __name__ == "__main__":
    sys.exit(main())
