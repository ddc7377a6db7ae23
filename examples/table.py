"""A table of your own: power of wind turbines by wind and temperature, each turbine known by ten measurements.

python examples/table.py

Writes a table of 120 turbines (made up, with units and noise), meta-trains on some, and predicts for one never seen.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np

import distmeta
from distmeta.adaptation import adapt_files

COLUMNS = ["turbine", "wind_m_s", "temperature_C", "power_kW"]


def measure(turbine: int, rows: int) -> list[list[object]]:
    """Measurements of one turbine: where its power rises, and how high, is its own."""
    rng = np.random.default_rng(turbine)
    rated, middle, steep, cold = rng.uniform((800, 6, 0.6, -0.004), (3000, 11, 1.2, 0.0))
    wind, temperature = rng.uniform(0, 20, rows), rng.uniform(-10, 30, rows)
    power = rated / (1 + np.exp(-steep * (wind - middle))) * (1 + cold * (temperature - 10))
    power += rng.normal(0, 0.01 * rated, rows)
    return [[f"turbine {turbine}", *map(float, row)] for row in zip(wind, temperature, power, strict=True)]


def write(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def main(folder: Path) -> None:
    table = write(folder / "turbines.csv", [row for turbine in range(120) for row in measure(turbine, 40)])
    run = distmeta.train(
        "tabular-maml", f"tasks.path={table}", "tasks.task=turbine", "tasks.features=[wind_m_s,temperature_C]",
        "tasks.targets=[power_kW]", "train.steps=300", "evaluation.tasks=100", "scaling.num_workers=0",
    )  # fmt: skip
    new = measure(1000, 60)
    support, query = write(folder / "new.csv", new[:10]), write(folder / "asked.csv", new[10:])
    found = adapt_files(run, support, query, run.path / "predicted")
    spread = np.std([float(str(row[-1])) for row in new[10:]])
    print(
        f"a new turbine, by 10 measurements: error {found.scores['rmse of power_kW']:.0f} kW (spread {spread:.0f} kW)"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
