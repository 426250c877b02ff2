"""Gradio's import without the stub files: for each class of component it parses its source, renders a .pyi and compares that with
the one in its own folder. This is for those who write components, is half of the import's time, and writes into an environment
that several servers may share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

_MODULE, _FUNCTION = "gradio.component_meta", "create_or_modify_pyi"


class _Finder:
    """Finds one module, once, as it would be found without this."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def without_stubs(module: ModuleType) -> None:
                execute(module)
                if hasattr(module, _FUNCTION):  # another Gradio may have none to leave out
                    setattr(module, _FUNCTION, lambda *_: None)

            spec.loader.exec_module = without_stubs  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Before Gradio is imported; after it, this changes nothing."""
    if _MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
