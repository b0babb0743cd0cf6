"""Data races in interpreted kernels: jax's interpreters print them, a test has to look."""

import contextlib
import importlib
from unittest import mock

import jax

INTERPRETERS = (  # each makes a fresh detector, by one of these names, for each kernel that it runs
    "jax._src.pallas.mosaic.interpret.interpret_pallas_call",
    "jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks",
)
DETECTORS = ("RaceDetectionState", "GPURaceDetectionState")


@contextlib.contextmanager
def no_races():
    """Fails if a kernel interpreted inside has a race, or if none was interpreted with `detect_races=True`."""
    made = []

    def recorded(detector):
        def make(*args, **kwargs):
            made.append(detector(*args, **kwargs))
            return made[-1]

        return make

    with contextlib.ExitStack() as stack:
        modules = [module for place in INTERPRETERS if (module := imported(place)) is not None]
        found = [(module, name) for module in modules for name in DETECTORS if hasattr(module, name)]
        assert {module for module, _ in found} == set(modules), f"this version of jax has other names: {found}"
        for module, name in found:
            stack.enter_context(mock.patch.object(module, name, recorded(getattr(module, name))))
        yield
        jax.effects_barrier()  # kernels run asynchronously
    watched = [detector for detector in made if detector.reads or detector.writes]
    assert watched, "no kernel was interpreted with detect_races=True"
    racy = sum(detector.races_found for detector in watched)
    assert not racy, f"{racy} of {len(watched)} kernels have a race: see 'RACE DETECTED' in the output"


def imported(place):
    """The module of an interpreter; None where it lacks absl-py, as that for GPUs may with jax 0.10, and cannot run."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != "absl":
            raise
        return None
