"""Import paths that stay valid after a module has moved: `import sdedit.framing` gives `sdedit.apps.framing` itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Path that users import: the module, or package with all that is in it, that it stands for.
MOVED = {
    "sdedit.evaluation": "sdedit.apps.evaluation",
    "sdedit.finetune": "sdedit.apps.finetune",
    "sdedit.framing": "sdedit.apps.framing",
    "sdedit.strokes": "sdedit.apps.strokes",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the paths of `MOVED`; a module is loaded once, whatever path it is imported by."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a path that stands for another one, else `None`."""
        return ModuleSpec(fullname, self) if _home(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that is meant in the place of the empty one that the import system made."""
        home = _home(module.__name__)
        assert home is not None
        sys.modules[module.__name__] = importlib.import_module(home)


def _home(fullname: str) -> str | None:
    for path, home in MOVED.items():
        if fullname == path or fullname.startswith(path + "."):
            return home + fullname[len(path) :]
    return None


def install() -> None:
    """Let the import system know the paths of `MOVED`, before it looks for files."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
