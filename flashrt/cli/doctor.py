"""flashrt doctor: what this machine has and gives."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import flashrt
from flashrt.cli import options
from flashrt.cli.console import Progress, emit, rate, show, size, table
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from flashrt.machine.doctor import DiskFigures


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(doctor))


def doctor(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", show_default=False, help="Measure the disk that holds DIR. Omitted: the cache's."
        ),
    ] = None,
    threads: options.Threads = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Measure this machine: cores, memory, disk, GPU. Takes about ten seconds and 1 GiB of disk, given back at once.

    The disk's figures are kept in the cache, where `plan` and the reports of `run` find them.

    Example: flashrt doctor --dir /mnt/nvme/packs
    """
    from flashrt.machine.disk import profile_path, save_disk_profile
    from flashrt.machine.doctor import examine_disk, memory_bandwidth
    from flashrt.machine.process import available_bytes, installed_bytes, memory_limit, usable_cores
    from flashrt.storage.names import default_cache
    from flashrt_kernels import ops

    if directory is not None and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: name one on the disk that is to be measured")
    cache = cache_dir or default_cache()
    kernels = ops.load("cpu")
    kernels.set_threads(usable_cores() if threads is None else threads)
    with Progress("measurements") as progress:
        disk = examine_disk(directory or cache, progress.of("measuring the disk"))
    kept = save_disk_profile(cache, disk.device, disk.profile)
    facts = {
        "flashrt": flashrt.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": kernels.threads(),
        "isa": kernels.isa(),
        "memory_bytes": installed_bytes(),
        "memory_available_bytes": available_bytes(),
        "cgroup_limit_bytes": memory_limit(),
        "memory_bytes_per_s": memory_bandwidth(kernels),
        "disk": {
            "directory": str(disk.directory),
            "direct": disk.direct,
            "backend": disk.backend,
            "plain_bytes_per_s": disk.plain,
            "best_bytes_per_s": disk.profile.sequential,
            "random_bytes_per_s": disk.profile.random,
        },
        "gpu": _gpu(),
        "profile": str(profile_path(cache)) if kept else None,
    }
    if json:
        emit(facts)
    else:
        _print(facts, disk)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any] | None:
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {
        "name": torch.cuda.get_device_name(),
        "memory_bytes": total,
        "memory_available_bytes": free,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _print(facts: dict[str, Any], disk: DiskFigures) -> None:
    limit = f", limited to {size(facts['cgroup_limit_bytes'])}" if facts["cgroup_limit_bytes"] else ""
    bandwidth = f", read at {rate(facts['memory_bytes_per_s'])}" if facts["memory_bytes_per_s"] else ""
    gpu = facts["gpu"]
    cores = f"{facts['usable_cores']} of {facts['cores']} cores usable"
    memory = f"{size(facts['memory_available_bytes'])} of {size(facts['memory_bytes'])} available"
    rows = {
        "flashrt": f"{facts['flashrt']}, Python {facts['python']}",
        "processor": f"{facts['cpu']}, {cores}, kernels for {facts['isa']}",
        "memory": f"{memory}{limit}{bandwidth}",
        "GPU": f"{gpu['name']}, {size(gpu['memory_available_bytes'])} free" if gpu else "none that torch could use",
        "disk": f"{disk.directory}: {rate(disk.plain)} in order by one reader, {rate(disk.profile.sequential)} at best "
        f"by {disk.backend}" + ("" if disk.direct else "; no O_DIRECT here, the page cache may flatter these figures"),
    }
    print("\n".join(f"{name:<9}  {value}" for name, value in rows.items()))
    _show_random(disk)
    kept = facts["profile"]
    print(f"kept in {kept}" if kept else "not kept: the cache directory cannot be written (see --cache-dir)")


def _show_random(disk: DiskFigures) -> None:
    from flashrt.machine.doctor import BLOCKS, DEPTHS

    result = table("random reads of", *(f"{depth} at a time" for depth in DEPTHS))
    for block in BLOCKS:
        result.add_row(size(block), *(rate(disk.profile.random[f"{block}/{depth}"]) for depth in DEPTHS))
    show(result)
