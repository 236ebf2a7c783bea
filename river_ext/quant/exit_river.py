"""The exit river of a model: built from its backbone, saved to a directory, loaded from it.

A saved river is the tensors `layers.<l>.<field>`, for every field of `ExitLayerWeights`, and `lm_head`, in
the layout of w4.py, and a JSON object that says what they are (`_facts`). river_store.py writes both. The
head came later: a river without one is loaded, too.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RiverError
from ..loading.config import ModelConfig
from ..loading.files import is_regular, path_of
from ..loading.json_object import Reader, read_json_object
from ..loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights, ModelWeights
from ..ops import TILE_COLS, TILE_ROWS, pack_w4, packed_shape
from ..progress import progress_bar
from . import hqq
from .river_store import FACTS, refuse_other_content, sha256_of, tensors_file, write_river
from .w4 import pack_exit_layer

FORMAT, FORMAT_VERSION = "river_ext W4", 2  # version 1 had no sha256
HEAD = "lm_head"  # the tensor that may be missing
HASH = re.compile("[0-9a-f]{64}")


class ExitRiver(list[ExitLayerWeights]):
    """The exit layers of a model, one per backbone layer, its head in 4 bits, and how they were made."""

    lm_head: torch.Tensor | None  # packed [vocab_size / 16, hidden_size / 64, 576], rows in the order of ids

    def __init__(
        self,
        layers: list[ExitLayerWeights],
        lm_head: torch.Tensor | None,
        group_size: int,
        quantiser: str = "hqq",
        calibration: dict | None = None,
        imported: dict | None = None,
    ):
        """
        Args:
            calibration: what river_ext.calibration found, if the layers were refined there.
            imported: where the layers come from, if they were imported.
        """
        super().__init__(layers)
        self.lm_head = lm_head
        self.group_size, self.quantiser, self.calibration = group_size, quantiser, calibration
        self.imported = imported


def build_river(
    config: ModelConfig, weights: ModelWeights, group_size: int = 64, progress: bool = True
) -> ExitRiver:
    """Quantises every decoder block of the backbone, one after the other, and the head, on their device.

    Args:
        config, weights: the backbone.
        group_size: columns that share a scale and a zero, 64 or 128.
        progress: show on standard error how far it is, if it takes long.
    """
    shape = BlockShape.of(config)
    steps = len(weights.layers) * len(shape.projections()) + 1
    with progress_bar("quantising", steps, progress) as advance:
        layers = [
            _build_exit_layer(block, shape, group_size, f"layers.{index}", advance)
            for index, block in enumerate(weights.layers)
        ]
        lm_head = pack_w4(*hqq.quantize(weights.lm_head, group_size, name=HEAD))
        advance()
    return ExitRiver(layers, lm_head, group_size)


def _build_exit_layer(
    block: DecoderBlockWeights, shape: BlockShape, group_size: int, name: str, advance: Callable[[], None]
) -> ExitLayerWeights:
    quantised = {}
    for projection in shape.projections():
        weight = getattr(block, projection)
        quantised[projection] = hqq.quantize(weight, group_size, name=f"{name}.{projection}")
        advance()
    return pack_exit_layer(quantised, shape)


def save_river(path: str | Path, river: ExitRiver, config: ModelConfig, fingerprint: str) -> None:
    """Writes a river to the directory `path`: all of it, or nothing if that fails or is interrupted.

    Args:
        path: a new directory, or a saved river to replace.
        river: what `build_river` or `load_river` returned.
        config, fingerprint: of the checkpoint that the river was built from.
    """
    path = path_of(path, "river")
    tensors = _tensors(river)
    try:
        refuse_other_content(path)  # before the work
        _check_metadata(tensors, str(path))
        write_river(path, tensors, _facts(river, config, fingerprint, sha256_of(tensors)))
    except (OSError, SafetensorError) as error:
        raise RiverError(f"{path}: cannot be written ({error}); a folder with free space is needed") from None


def load_river(
    path: str | Path, config: ModelConfig, fingerprint: str, device: torch.device | str = "cpu"
) -> ExitRiver:
    """Loads a saved river; on the CPU its tensors are views of the mapped file.

    Args:
        path: a directory that `save_river` wrote.
        config, fingerprint: of the checkpoint at hand. A river that was built from another one is refused.
        device: where the tensors go.
    """
    path = path_of(path, "river")
    while True:
        facts = read_facts(path)
        _check_fits(Reader(path / FACTS, facts), config, fingerprint)
        try:
            stored = _stored_tensors(tensors_file(path, facts["sha256"]), _packed_shapes(config))
            break
        except RiverError:
            if read_facts(path) == facts:
                raise  # else another river took its place in between, tensors and all
    file = tensors_file(path, facts["sha256"])
    if sha256_of(stored) != facts["sha256"]:
        raise RiverError(f"{file}: not what was saved, its sha256 is not the one in {FACTS}; convert again")
    _check_metadata(stored, str(file))
    names = BlockShape.of(config).tiles()
    layers = [
        ExitLayerWeights(**{name: stored[f"layers.{index}.{name}"].to(device) for name in names})
        for index in range(config.num_hidden_layers)
    ]
    lm_head = stored[HEAD].to(device) if HEAD in stored else None
    more = {name: facts.get(name) for name in ("calibration", "imported")}
    return ExitRiver(layers, lm_head, facts["group_size"], facts["quantiser"], **more)


def read_facts(path: str | Path) -> dict:
    """The facts of a saved river, checked: those of `_facts`."""
    path = path_of(path, "river")
    if not is_regular(path / FACTS):
        raise RiverError(f"{path}: no {FACTS} in it; a directory that `river convert` wrote is needed")
    facts = Reader(path / FACTS, read_json_object(path / FACTS))
    facts.exactly("format", FORMAT)
    facts.exactly("format_version", FORMAT_VERSION, f"{FORMAT_VERSION}; convert the checkpoint again")
    known = FACT_NAMES
    quantiser = facts.choice("quantiser", ("hqq", "gptq", "imported"))
    if quantiser == "gptq":
        _check_calibration(facts)
        known += ("calibration",)
    if quantiser == "imported":
        _check_import(facts)
        known += ("imported",)
    if facts.integer("group_size", 0, 1 << 20) not in hqq.GROUP_SIZES:
        facts.fail("group_size", ", ".join(map(str, hqq.GROUP_SIZES)))
    for key in ("fingerprint", "sha256"):
        if not _is_hash(facts.values.get(key)):
            facts.fail(key, "64 hexadecimal digits")
    facts.integer("num_hidden_layers", 1, 1 << 20)
    shape = facts.values.get("block")
    names = list(BlockShape.__dataclass_fields__)
    if not isinstance(shape, dict) or shape.keys() != set(names):
        facts.fail("block", f"an object with {', '.join(names)}")
    for name in names:
        Reader(facts.path, shape, prefix="block.").integer(name, 0, 1 << 30)
    for key in facts.values.keys() - set(known):
        facts.fail(key, f"no such key; those of a river are {', '.join(known)}")
    return facts.values


def _check_calibration(facts: Reader) -> None:
    found, names = facts.values.get("calibration"), (*CALIBRATION_COUNTS, *CALIBRATION_NUMBERS)
    if not isinstance(found, dict) or found.keys() != set(names):
        facts.fail("calibration", f"an object with {', '.join(names)}")
    calibration = Reader(facts.path, found, prefix="calibration.")
    for name in CALIBRATION_COUNTS:
        calibration.integer(name, 1, 1 << 30)
    for name, highest in CALIBRATION_NUMBERS.items():
        calibration.number(name, 0, highest)


def _check_import(facts: Reader) -> None:
    found, names = facts.values.get("imported"), ("source", "files", *IMPORT_COUNTS, IMPORT_ERROR)
    if not isinstance(found, dict) or found.keys() != set(names):
        facts.fail("imported", f"an object with {', '.join(names)}")
    imported = Reader(facts.path, found, prefix="imported.")
    if not isinstance(found["source"], str):
        imported.fail("source", "the name of a format")
    if not isinstance(found["files"], dict) or not all(map(_is_hash, found["files"].values())):
        imported.fail("files", "64 hexadecimal digits for each file")
    for name in IMPORT_COUNTS:
        imported.integer(name, 0, 1 << 20)
    imported.number(IMPORT_ERROR, 0, 1e30)


def _is_hash(value) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _check_fits(facts: Reader, config: ModelConfig, fingerprint: str) -> None:
    """Refuses a river of another checkpoint."""
    if facts.values["fingerprint"] != fingerprint:
        raise RiverError(
            f"{facts.path}: built from another checkpoint, fingerprint {facts.values['fingerprint']}; "
            f"accepted is a river of the one at hand, {fingerprint}"
        )
    facts.exactly("num_hidden_layers", config.num_hidden_layers)
    block = Reader(facts.path, facts.values["block"], prefix="block.")
    for name, size in asdict(BlockShape.of(config)).items():
        block.exactly(name, size, f"{size}, as the checkpoint's config.json has it")


FACT_NAMES = (
    "format", "format_version", "quantiser", "group_size", "fingerprint", "sha256",
    "num_hidden_layers", "block",
)  # fmt: skip
CALIBRATION_COUNTS = ("texts", "tokens", "held_out_tokens")
CALIBRATION_NUMBERS = {"agreement_before": 1, "agreement": 1, "kl_before": 1e30, "kl": 1e30}  # the highest
IMPORT_COUNTS = ("kept", "requantised", "from_backbone")  # of projections
IMPORT_ERROR = "relative_squared_error"  # of the weights in the river, to those that were imported


def _facts(river: ExitRiver, config: ModelConfig, fingerprint: str, sha256: str) -> dict:
    """What river.json holds; block is the shape of a decoder block, sha256 that of the tensors.

    A river that was refined has its `calibration` as well, one that was imported says so in `imported`.
    """
    values = (
        FORMAT, FORMAT_VERSION, river.quantiser, river.group_size, fingerprint, sha256, len(river),
        asdict(BlockShape.of(config)),
    )  # fmt: skip
    facts = dict(zip(FACT_NAMES, values, strict=True))
    more = {"calibration": river.calibration, "imported": river.imported}
    return facts | {name: value for name, value in more.items() if value is not None}


def river_sha256(river: ExitRiver) -> str:
    """What tells this river from others of the same model."""
    return sha256_of(_tensors(river))


def _tensors(river: ExitRiver) -> dict[str, torch.Tensor]:
    layers = {
        f"layers.{index}.{field.name}": getattr(layer, field.name).cpu()
        for index, layer in enumerate(river)
        for field in fields(layer)
    }
    return layers if river.lm_head is None else layers | {HEAD: river.lm_head.cpu()}


def _packed_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Name and shape of every tensor of a river."""
    layers = {
        f"layers.{index}.{field}": shape
        for index in range(config.num_hidden_layers)
        for field, shape in BlockShape.of(config).tiles().items()
    }
    return layers | {HEAD: packed_shape(config.vocab_size, config.hidden_size)}


def _stored_tensors(path: Path, shapes: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Views of the tensors in a file, which must be those of `shapes`, but that the head may be missing."""
    if not is_regular(path):
        raise RiverError(f"{path}: missing; {FACTS} names it: convert again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RiverError(f"{path}: not a complete safetensors file ({str(error)[:160]})") from None
    for name, shape in shapes.items():
        wanted = f"uint8 {list(shape)}"
        if name not in stored:
            if name == HEAD:
                continue
            raise RiverError(f"{path}: tensor {name} {wanted} is missing")
        found = f"{stored[name].dtype} {list(stored[name].shape)}".removeprefix("torch.")
        if found != wanted:
            raise RiverError(
                f"{path}: tensor {name} is {found}; the checkpoint's config.json asks for {wanted}"
            )
    for name in sorted(stored.keys() - shapes.keys()):
        raise RiverError(f"{path}: tensor {name[:120]} has no place in the river of this checkpoint")
    return stored


def _check_metadata(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuses scales and zeros that are not finite: they follow the nibbles of a tile."""
    for name, tensor in tensors.items():
        metadata = tensor[..., TILE_ROWS * TILE_COLS // 2 :].contiguous().view(torch.float16)
        if not metadata.isfinite().all():
            raise RiverError(f"{where}: tensor {name} has a scale or a zero that is not finite")
