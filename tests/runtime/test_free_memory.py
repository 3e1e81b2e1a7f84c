"""Free memory, within the limits of containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from greedyprune.runtime.free_memory import free_in_cgroups


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/job/step", {"job/memory.max": "900", "job/memory.current": "700",
                          "job/memory.stat": "anon 5\ninactive_file 30\nactive_file 20\nfile 9",
                          "job/step/memory.max": "max", "job/step/memory.current": "3"}, [250]),
        ("5:cpu:/a\n4:memory:/a", {"memory/a/memory.limit_in_bytes": "900",
                                   "memory/a/memory.usage_in_bytes": "950",
                                   "memory/memory.limit_in_bytes": "1000",
                                   "memory/memory.usage_in_bytes": "960"}, [0, 40]),
        ("0::/elsewhere", {"memory.max": "900", "memory.current": "100"}, [800]),
        ("4:cpu:/", {}, []),
    ],
)  # fmt: skip
def test_limits_of_containers(
    groups: str, files: dict[str, str], free: list[int], tmp_path: Path
) -> None:
    """Of version 2 and 1, of the group and those it is in."""
    for name, text in {"../../../proc/self/cgroup": groups, **files}.items():
        path = (tmp_path / "sys/fs/cgroup" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(free_in_cgroups(tmp_path)) == free
