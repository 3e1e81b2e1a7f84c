"""How much memory is free. Half of it is what `memory_limit=None` means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class CgroupFiles(NamedTuple):
    """Where a version of Linux's control groups ("cgroups") keeps the memory limit of a group.

    folder:      of the groups, below the root of the file system
    limit, used: the files with the limit and the bytes in use
    prefix:      what the names in memory.stat begin with that count the whole group
    """

    folder: str
    limit: str
    used: str
    prefix: str


V1 = CgroupFiles("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = CgroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "")
# Copies of files in memory count as used, but the kernel frees them for new allocations.
FILE_COPIES = "active_file", "inactive_file"


def room(device: torch.device) -> int:
    """Half the bytes that are free on a device; memory that torch holds in reserve is free."""
    if device.type != "cuda":
        return min(psutil.virtual_memory().available, *free_in_cgroups()) // 2
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + reserve) // 2


def free_in_cgroups(root: Path = Path("/")) -> Iterator[int]:
    """The bytes that each limited control group of this process has free.

    Slurm, Docker and Kubernetes set such limits. A process that exceeds one is killed, however much
    memory the machine has. root: the root of the file system (tests give another one)
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group_path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = V1 if controllers else V2
        group = Path(group_path.lstrip("/"))
        folders = (root / files.folder / path for path in (group, *group.parents))
        for folder in dict.fromkeys(folders):
            limit, used = _read(folder / files.limit).strip(), _read(folder / files.used).strip()
            if limit.isdecimal() and used.isdecimal():  # without a limit, V2 says "max"
                stat = dict(
                    entry.split()[:2] for entry in _read(folder / "memory.stat").splitlines()
                )
                copies = sum(int(stat.get(files.prefix + name, 0)) for name in FILE_COPIES)
                yield max(0, int(limit) - max(0, int(used) - copies))


def _read(path: Path) -> str:
    """The text of a file; empty where this system or a container does not show the file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
