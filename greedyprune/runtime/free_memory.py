"""How much memory is free: what `memory_limit=None` means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Where a container or a batch system keeps its limits, by version: folder, limit, use, and what
# copies of files in memory begin with; those are given up for what comes.
V2 = "sys/fs/cgroup", "memory.max", "memory.current", ""
V1 = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
FILES = "active_file", "inactive_file"


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
        top, limit, use, whole = V1 if controllers else V2
        group = Path(own.lstrip("/"))
        for folder in dict.fromkeys(root / top / each for each in (group, *group.parents)):
            most, used = _read(folder / limit).strip(), _read(folder / use).strip()
            if most.isdecimal() and used.isdecimal():
                stat = dict(
                    entry.split()[:2] for entry in _read(folder / "memory.stat").splitlines()
                )
                files = sum(int(stat.get(whole + name, 0)) for name in FILES)
                yield max(0, int(most) - max(0, int(used) - files))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # another system, or outside of what a container sees
        return ""
