"""Edit open-weight models with forward passes only: prune, unlearn, verify."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modhifi.api import audit as audit
    from modhifi.api import bench as bench
    from modhifi.api import compare as compare
    from modhifi.api import heal as heal
    from modhifi.api import prune as prune
    from modhifi.api import score as score
    from modhifi.api import unlearn as unlearn
    from modhifi.api import verify as verify
    from modhifi.data.mixture import Mixture as Mixture
    from modhifi.errors import ModhifiError as ModhifiError
    from modhifi.models.artifact import load as load
    from modhifi.models.load import load_model as load_model
    from modhifi.pruning.selectors.base import register_selector as register_selector
    from modhifi.structure.tracing.operations import register_operation as register_operation

# The public functions: name, file of the package. They are imported at first use, so that `import modhifi` stays quick.
PUBLIC = {
    "Mixture": "data.mixture",
    "ModhifiError": "errors",
    "audit": "api",
    "bench": "api",
    "compare": "api",
    "heal": "api",
    "load": "models.artifact",
    "load_model": "models.load",
    "prune": "api",
    "register_selector": "pruning.selectors.base",
    "register_operation": "structure.tracing.operations",
    "score": "api",
    "unlearn": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'modhifi' has no attribute {name!r}")
    return getattr(importlib.import_module(f"modhifi.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
