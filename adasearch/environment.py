"""What figures depend on beside the study: versions and the machine."""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata

PACKAGES = ("adasearch", "torch", "transformers", "optuna", "botorch", "ray", "datasets", "lm_eval", "peft", "pandas")


def versions() -> dict[str, str]:
    """Return the version of each package that can change a figure."""
    return {name: metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, str]:
    """Return the name, cores and system of this machine."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
    }
