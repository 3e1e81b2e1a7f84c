"""How much memory is free: what `memory_limit=None` means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Where a container or a batch system keeps its limits, by version: folder, limit, use, file cache.
V2 = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
V1 = (
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)  # fmt: skip


def room(device: torch.device) -> int:
    """Half the bytes that are free on a device, or that torch holds there for what comes."""
    if device.type != "cuda":
        return min(psutil.virtual_memory().available, *free_in_cgroups()) // 2
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + held) // 2


def free_in_cgroups(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that this process's control groups leave it, as under Slurm, Docker or Kubernetes;
    beyond them it is killed, however much the machine has.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, use, cache = V1 if controllers else V2
        group = Path(own.lstrip("/"))
        for folder in dict.fromkeys(root / top / each for each in (group, *group.parents)):
            most, used = _read(folder / limit).strip(), _read(folder / use).strip()
            if most.isdecimal() and used.isdecimal():
                stat = dict(
                    entry.split()[:2] for entry in _read(folder / "memory.stat").splitlines()
                )
                yield max(0, int(most) - int(used) + int(stat.get(cache, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or outside of what a container sees
        return ""
