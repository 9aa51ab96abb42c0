"""Where the real corpora are, if present: beside the repository, or where ``MSACORE_DATA`` says."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MSACORE_DATA") or Path(__file__).parents[2] / "shared" / "data")
MOSI = DATA / "mosi.npz"
MMMO = DATA / "mmmo_seq.npz"

needs_real_data = pytest.mark.skipif(
    not (MOSI.is_file() and MMMO.is_file()),
    reason="research data is not redistributable: set MSACORE_DATA to the folder with mosi.npz and mmmo_seq.npz",
)
