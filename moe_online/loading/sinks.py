"""Where finished units go: into leaves on the devices, or beside them into the host's memory."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from moe_online.loading.steps import allocate
from moe_online.loading.units import Unit


class Sink(Protocol):
    """Gives each unit something to write into, and takes it back."""

    def stored(self, unit: Unit) -> Any:
        """What the step of a unit writes into, abstract."""
        ...

    def begin(self, unit: Unit) -> tuple[Any, int]:
        """That array, to be donated, and the row of it at which the unit begins."""
        ...

    def finish(self, unit: Unit, array: Any) -> None:
        """Takes what the step returned."""
        ...

    def drop(self) -> None:
        """Frees all: the load has failed."""
        ...


class OnDevices:
    """Finished leaves by name, each allocated when its first unit comes."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def stored(self, unit: Unit) -> Any:
        """The leaf."""
        return unit.target.stored

    def begin(self, unit: Unit) -> tuple[Any, int]:
        """The leaf as far as it has come."""
        name = unit.target.name
        if name not in self.arrays:
            self.arrays[name] = allocate(unit.target.stored)
        return self.arrays[name], unit.start

    def finish(self, unit: Unit, array: Any) -> None:
        """Keeps it for the next unit."""
        self.arrays[unit.target.name] = array

    def drop(self) -> None:
        """A traceback would keep them on the devices."""
        for array in jax.tree.leaves(self.arrays):
            array.delete()


class OnHost:
    """Finished leaves by name as numpy arrays; of each unit only its own rows are on the devices, and not for long."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self._present: Any = None

    def stored(self, unit: Unit) -> Any:
        """The unit's rows."""
        return unit.stored

    def begin(self, unit: Unit) -> tuple[Any, int]:
        """Memory for the unit's rows."""
        target = unit.target
        if target.name not in self.arrays:
            self.arrays[target.name] = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target.stored)
        self._present = allocate(unit.stored)
        return self._present, 0

    def finish(self, unit: Unit, array: Any) -> None:
        """Copies the rows to their place."""
        for into, rows in zip(jax.tree.leaves(self.arrays[unit.target.name]), jax.tree.leaves(array), strict=True):
            unit.write(into, np.asarray(rows))
            rows.delete()
        self._present = None

    def drop(self) -> None:
        """Of the devices there is at most the present unit."""
        for array in jax.tree.leaves(self._present):
            array.delete()
        self.arrays.clear()
