"""What a reader needs to know of the machine to compare runs, and what this process can see of itself."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from pathlib import Path


def facts(directory: Path) -> dict[str, str]:
    build = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with GIL"
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, {platform.platform()}",
        "disk": f"{file_system(directory)}, {shutil.disk_usage(directory).free / 2**30:.0f} GiB free",
        "python": f"{platform.python_implementation()} {platform.python_version()} {build}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory: the mount with the longest path that leads to it."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown file system"
    leading = [(len(where), kind) for _, where, kind, *_ in mounts if directory.resolve().is_relative_to(where)]
    return max(leading)[1] if leading else "unknown file system"


def anon_kb() -> int:
    """Memory of this process that no file backs (so without the pages of a mapped index); 0 where nobody tells."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def disk_bytes(directory: Path) -> int:
    """What the files of a directory occupy, by blocks: a sparse file counts for what is written of it."""
    total = 0
    for place, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a segment may go while we look
    return total
