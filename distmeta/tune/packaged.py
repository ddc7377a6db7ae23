"""The searches of `tune_configs/`."""

from pathlib import Path


def searches() -> dict[str, Path]:
    """The searches that come with the package, by name."""
    here = Path(__file__).parent
    folders = [here / "configs", here.parents[1] / "tune_configs"]  # as a wheel has them, and as the source tree
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
