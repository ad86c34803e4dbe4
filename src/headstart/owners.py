"""Which process has something in hand, and whether that process is gone: for work that several processes share."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How launchers say what they start: torchrun and accelerate, then the MPIs that accelerate knows.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launched() -> tuple[int, int]:
    """This process's number, from 0, among those that a launcher has started together, and how many they are."""

    def said(names: tuple[str, ...]) -> int:
        words = [os.environ.get(name, "") for name in names]
        return max((int(word) for word in words if word.isdecimal()), default=0)

    world = max(said(_WORLD_SIZES), 1)
    return said(_RANKS) if world > 1 else 0, world


def this_process() -> dict[str, Any]:
    """What this process is known by: the machine (or container), its number there, and when it was started."""
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended; False for one of another machine, and where nobody can tell."""
    # Windows has no harmless signal to ask with.
    if os.name != "posix" or owner.get("host") != _host():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process: perhaps the number was given anew
        pass
    if _stat(int(owner["pid"]))[:1] in (["Z"], ["X"]):  # ended, and not yet asked about by whoever started it
        return True
    return bool(owner["started"] and owner["started"] != _started(int(owner["pid"])))


def is_at_work(owner: Mapping[str, Any]) -> bool:
    """Whether it is known to be another process of this machine that has not ended."""
    is_here = os.name == "posix" and owner.get("host") == _host() and isinstance(owner.get("pid"), int)
    return is_here and owner["pid"] != os.getpid() and not is_gone({"started": "", **owner})


def _host() -> str:
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"  # each container counts its own processes
    except OSError:
        return platform.node()


def _started(pid: int) -> str:
    """When a process was started, in ticks since the machine was; '' where it cannot be known."""
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on, which is a letter; nothing where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
