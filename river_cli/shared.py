"""What commands share: the model that they run, and what they say of it and of the machine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import river_ext
from river_ext import __version__, ops
from river_ext.checks import number, short
from river_ext.errors import RiverError
from river_ext.loading.calibrated import read_calibrated
from river_ext.loading.config import ModelConfig, read_config
from river_ext.loading.offloaded import checked_resident_layers
from river_ext.model import DEMO

from .terminal import printable


def load(arguments):
    return river_ext.load(
        arguments.model,
        arguments.device,
        arguments.dtype,
        arguments.river,
        resident_layers=arguments.resident_layers,
        calibrated=calibrated(arguments),
    )


def calibrated(arguments) -> str | None:
    """The file of a calibrated threshold; not every command takes one."""
    return getattr(arguments, "calibrated", None)


def config(arguments) -> ModelConfig:
    """Of the model that `load` would load, but for its dtype; its weights are not read."""
    config = read_config(directory(arguments))
    path = calibrated(arguments)
    return replace(
        config,
        resident_layers=checked_resident_layers(arguments.resident_layers, config),
        calibrated=None if path is None else read_calibrated(path, config.num_hidden_layers),
    )


def directory(arguments) -> Path:
    """Of the checkpoint that the arguments name."""
    return DEMO if arguments.model is None else Path(arguments.model)


def model_facts(model) -> dict:
    """What a measurement was made with, for JSON."""
    build = ops._C.build_info()
    return {
        "version": __version__,
        "model": str(model.directory),
        "fingerprint": model.fingerprint,
        "num_hidden_layers": model.config.num_hidden_layers,
        "resident_layers": model.config.resident_layers,
        "dtype": dtype_name(model.config),
        "device": _device_name(model),
        "cpu_isa": build["cpu_isa"],
        "threads": torch.get_num_threads(),
    }


def thresholds(text: str | None, default: Sequence[float]) -> Sequence[float]:
    """What --thresholds says."""
    if text is None:
        return default
    try:
        return [number("--thresholds", float(part)) for part in text.split(",")]
    except ValueError:
        raise RiverError(
            f"--thresholds {short(text)}; accepted: numbers, not NaN, with commas between"
        ) from None


def import_line(imported: dict) -> str:
    """Where an imported river comes from, and what the import did to its weights."""
    counts = (
        f"{imported['kept']} projections as they are, {imported['requantised']} quantised again"
        f" (relative squared error of all {imported['relative_squared_error']:.5f}),"
        f" {imported['from_backbone']} from the model"
    )
    return f"from {imported['source']}: {counts}"


def model_line(model) -> str:
    name = "the bundled demo model" if model.directory == DEMO else printable(str(model.directory))
    config = model.config
    return f"river {__version__}, {name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}"


def machine(model) -> str:
    if model.network.device.type == "cuda":
        return _device_name(model)
    return f"the CPU ({ops._C.build_info()['cpu_isa']}, {threads()})"


def threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def _device_name(model) -> str:
    device = model.network.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def dtype_name(config) -> str:
    return str(config.dtype).removeprefix("torch.")
