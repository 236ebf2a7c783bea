"""What commands share: the model that they run, and what they say of it and of the machine."""

from .. import __version__
from .terminal import printable


def load(arguments):
    from ..model import load

    return load(arguments.model, arguments.device, arguments.dtype, arguments.river)


def model_facts(model) -> dict:
    """What a measurement was made with, for JSON."""
    import torch

    from .. import ops

    build = ops._C.build_info()
    return {
        "version": __version__,
        "model": str(model.directory),
        "fingerprint": model.fingerprint,
        "num_hidden_layers": model.config.num_hidden_layers,
        "dtype": dtype_name(model.config),
        "device": _device_name(model),
        "cpu_isa": build["cpu_isa"],
        "threads": torch.get_num_threads(),
    }


def model_line(model) -> str:
    from ..model import DEMO

    name = "the bundled demo model" if model.directory == DEMO else printable(str(model.directory))
    config = model.config
    return f"river {__version__}, {name}: {config.num_hidden_layers} layers, hidden {config.hidden_size}"


def machine(model) -> str:
    from .. import ops

    if model.network.device.type == "cuda":
        return _device_name(model)
    return f"the CPU ({ops._C.build_info()['cpu_isa']}, {threads()})"


def threads() -> str:
    import torch

    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def _device_name(model) -> str:
    import torch

    device = model.network.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def dtype_name(config) -> str:
    return str(config.dtype).removeprefix("torch.")
