"""Peak resident memory of this process since a moment, as the kernel counted it; Linux only.

`ru_maxrss` would not do: a child inherits that of its parent.
"""

import pathlib
import sys

import psutil
import pytest

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def reset_peak() -> int:
    """Begins anew; returns what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
