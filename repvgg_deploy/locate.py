"""Where the data folders `models/` and `calibration/` lie: inside a wheel, or beside the package in a checkout."""

from pathlib import Path


def data_folder(name: str) -> Path:
    """The folder `models` or `calibration`, as installed from a wheel or as found in the repository."""
    package = Path(__file__).resolve().parent
    packed = package / "_data" / name
    return packed if packed.is_dir() else package.parent / name
