"""Loads the native extension, or says in one message what is wrong and what to run."""

import importlib

import torch


def load_extension() -> None:
    """Import ``msacore._C``, which registers the operators with torch.

    Raises:
        ImportError: The extension is missing or does not fit the installed torch or Python.
    """
    try:
        importlib.import_module("msacore._C")
    except ImportError as error:
        if "msacore._C" in str(error) and isinstance(error, ModuleNotFoundError):
            reason = "the native extension msacore._C is not built for this Python"
        else:
            reason = f"the native extension msacore._C does not load: {error}"
        raise ImportError(
            f"msacore: {reason}. Found: torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}); "
            "needed: torch >= 2.11, and a CUDA torch if the extension was built with CUDA. "
            "Build it for this environment with: pip install --no-build-isolation --force-reinstall --no-deps . "
            "(add --editable before the dot to use it in the source folder)"
        ) from error
