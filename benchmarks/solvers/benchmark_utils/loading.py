"""Solver and data set files of a benchopt benchmark, without benchopt's runner."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class Modules:
    """Imports from a benchmark's folder; as a context, during which its `benchmark_utils` is the one to be found."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def __enter__(self):
        self._forget()
        sys.path.insert(0, str(self.folder))
        return self

    def __exit__(self, *_):
        sys.path.remove(str(self.folder))
        self._forget()

    def load(self, kind: str, name: str) -> ModuleType:
        """The module `<kind>/<name>.py`; kind is "solvers" or "datasets".

        Raises:
          FileNotFoundError: if there is no such file.
        """
        path = self.folder / kind / f"{name}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: name a file of a benchmark that has been cloned there.")
        spec = importlib.util.spec_from_file_location(f"{self.folder.name}_{kind}_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @staticmethod
    def _forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "benchmark_utils"]:
            del sys.modules[name]
