"""How fast devices are: data sheets of GPUs, and a measurement of the processor at hand."""

import statistics
import time
from dataclasses import dataclass

from mirasol.config.recipe import Recipe
from mirasol.errors import UserError


@dataclass(frozen=True)
class DataSheet:
    """A GPU's dense bfloat16 TFLOP/s and its memory's GB/s."""

    tflops: float
    gb_per_second: float


# The first name that is part of a device's own name applies.
DATA_SHEETS = {
    "H200": DataSheet(989.0, 4800.0),
    "H100 PCIe": DataSheet(756.0, 2000.0),
    "H100": DataSheet(989.0, 3350.0),
    "A100": DataSheet(312.0, 2039.0),
    "L40S": DataSheet(362.0, 864.0),
    "B200": DataSheet(2250.0, 8000.0),
}
ASSUMED_GPU = "H100"


def find_data_sheet(device_name: str) -> tuple[str, DataSheet] | None:
    """The GPU's name in `DATA_SHEETS` and its data sheet; None if it is unknown."""
    return next((entry for entry in DATA_SHEETS.items() if entry[0] in device_name), None)


def find_peak_tflops(recipe: Recipe, given: float | None) -> tuple[float, str]:
    """TFLOP/s of one device that the recipe runs on, and the source of the figure.

    Raises:
        UserError: none was given, and there is no data sheet of the GPU here.
    """
    import torch

    if given is not None:
        return given, "as given"
    if runs_on_processor(recipe):
        return measure_tflops(), "a matrix product in float32, measured here"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED_GPU
    found = find_data_sheet(name)
    if found is None:
        raise UserError(f"--peak-tflops: the peak of {name} is unknown: give it")
    return found[1].tflops, f"data sheet of {found[0]}, dense bfloat16"


def runs_on_processor(recipe: Recipe) -> bool:
    """Whether the recipe would run on this machine's processor.

    A recipe for several devices is planned on a laptop and runs elsewhere; any other one would run here.
    """
    import torch

    here = torch.cuda.is_available()
    return recipe.device == "cpu" or (recipe.device == "auto" and recipe.parallel.kind == "none" and not here)


def measure_tflops(size: int = 1024) -> float:
    """TFLOP/s of this machine's processor in a product of float32 matrices, with as many threads as PyTorch takes."""
    import torch

    left, seconds = torch.ones(size, size), []
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds) / 1e12
