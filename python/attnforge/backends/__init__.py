"""Kernels by backend and family: each module ``backends/<backend>/<family>.py`` has ``SPECS``.

Importing a module here loads nothing native and compiles nothing: launchers are named in the
specs and imported at their first call.
"""

from __future__ import annotations

import importlib
import pkgutil

from attnforge.registry.spec import KernelSpec

__all__ = ["discover"]


def discover() -> list[KernelSpec]:
    """The specs of every family module of every backend package, found by the file system."""
    found: list[KernelSpec] = []
    for backend in pkgutil.iter_modules(__path__):
        if not backend.ispkg:  # what backends share
            continue
        package = importlib.import_module(f"{__name__}.{backend.name}")
        for family in pkgutil.iter_modules(package.__path__):
            if not family.name.startswith("_"):
                module = importlib.import_module(f"{package.__name__}.{family.name}")
                found.extend(module.SPECS)
    return found
