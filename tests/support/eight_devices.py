"""Functions of a test module, run in a process of its own where a CPU counts as eight devices."""

import json
import subprocess
import sys


def in_eight_devices(request, module, name, **arguments):
    """Calls `name` of a module beside the loader's tests; returns what it prints last, as JSON."""
    paths = [str(request.config.rootpath / "tests" / part) for part in ("support", "loading")]
    code = f"""
import sys
sys.path[:0] = {paths!r}
import jax
jax.config.update("jax_num_cpu_devices", 8)
import {module}
{module}.{name}(**{arguments!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])
