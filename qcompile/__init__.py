"""qcompile: quantized inference and training as a backend of `torch.compile`.

`torch.compile(model, backend="qcompile")` needs no import of this package; the names below are for the rest. A program that
was saved with `torch.ops.qcompile.*` in it needs the import and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qcompile.api import (
        Conversion,
        Explanation,
        Preparation,
        compile,
        convert,
        default_passes,
        explain,
        learned_scales,
        load,
        prepare,
        refresh,
        save,
        trained_recipe,
    )
    from qcompile.errors import QCError, QCWarning
    from qcompile.ir.scheme import Scheme
    from qcompile.options import Options
    from qcompile.passes.base import Pass, PassContext
    from qcompile.plan.recipe import Recipe, Rule

_HOMES = {
    "compile": "api",
    "convert": "api",
    "default_passes": "api",
    "explain": "api",
    "learned_scales": "api",
    "load": "api",
    "prepare": "api",
    "refresh": "api",
    "save": "api",
    "trained_recipe": "api",
    "Conversion": "api",
    "Explanation": "api",
    "Preparation": "api",
    "QCError": "errors",
    "QCWarning": "errors",
    "Scheme": "ir.scheme",
    "Options": "options",
    "Pass": "passes.base",
    "PassContext": "passes.base",
    "Recipe": "plan.recipe",
    "Rule": "plan.recipe",
}


def __getattr__(name: str) -> object:
    # Lazy: importing the backend loads Inductor, which a reader of `qcompile.Scheme` does not need.
    if name in _HOMES:
        return getattr(importlib.import_module(f"qcompile.{_HOMES[name]}"), name)
    if name == "optim":  # as torch.optim is there after `import torch`
        return importlib.import_module("qcompile.optim")
    raise AttributeError(f"module 'qcompile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "optim"})


importlib.import_module("qcompile.operators").arrange()  # torch.ops.qcompile.*, now or when torch is imported


__all__ = [
    "Conversion",
    "Explanation",
    "Options",
    "Pass",
    "PassContext",
    "Preparation",
    "QCError",
    "QCWarning",
    "Recipe",
    "Rule",
    "Scheme",
    "__version__",
    "compile",
    "convert",
    "default_passes",
    "explain",
    "learned_scales",
    "load",
    "prepare",
    "refresh",
    "save",
    "trained_recipe",
]
