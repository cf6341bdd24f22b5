"""The tests' own surroundings: what the user's environment says of hubs, threads, proxies and homes stays outside."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Settings of the libraries that are used; some are read once, when a library is imported.
PREFIXES = (
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "OMP_",
    "MKL_",
    "KMP_",
    "JAX_",
    "XLA_",
    "TQDM_",
    "MPL",
)
NAMES = ("FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "PYTHONWARNINGS")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")
_MARK = "SDEDIT_TESTS_HOME"  # workers of one run share a home


def make_own() -> None:
    """Forget the user's settings, and give caches and homes a folder that is thrown away."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in PROXIES:
            del os.environ[name]
    if _MARK not in os.environ:
        os.environ[_MARK] = tempfile.mkdtemp(prefix="sdedit-tests-")
        atexit.register(shutil.rmtree, os.environ[_MARK], ignore_errors=True)
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ[name] = os.environ[_MARK]
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # two workers on two cores spin for each other otherwise
