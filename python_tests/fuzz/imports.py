"""4-bit checkpoints of other formats, and GGUF files, of which bytes or settings have been changed."""

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .checkpoints import replace_file
from .mutate import dump_json, mutate_bytes, mutate_json
from .samples import write_checkpoint

GGUF = "model.gguf"


class State:
    def __init__(self, folder: Path):
        from gguf_files import gguf_bytes, model_parts
        from packed_checkpoints import FORMATS, write_packed

        from river_ext.loading.checkpoint import load_checkpoint

        model = write_checkpoint(folder / "model", intermediate_size=128)
        self.checkpoint = load_checkpoint(model)
        self.start, self.work = folder / "start", folder / "work"
        self.start.mkdir()
        for format in FORMATS:
            write_packed(self.start / format, model, format, group_size=32 if format == "GPTQ" else 64)
        self.sources = list(FORMATS)
        if importlib.util.find_spec("gguf"):
            metadata, tensors, _ = model_parts(model, lambda name: "Q4_0")
            self.header = len(gguf_bytes(metadata, dict.fromkeys(tensors, ((32,), 0, b""))))
            (self.start / GGUF).write_bytes(gguf_bytes(metadata, tensors))
            self.sources.append(GGUF)


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    from river_ext import RiverError
    from river_ext.quant.imported.build import import_river

    shutil.rmtree(state.work, ignore_errors=True)
    source = random.choice(state.sources)
    if source == GGUF:
        state.work.mkdir()
        path = state.work / GGUF
        path.write_bytes(changed_gguf(random, (state.start / GGUF).read_bytes(), state.header))
    else:
        path = state.work
        shutil.copytree(state.start / source, path)
        change(path, random)
    try:
        river = import_river(path, state.checkpoint.config, state.checkpoint.weights, progress=False)
    except RiverError as error:
        expect_one_line(error)
        return REFUSED
    imported = river.imported
    expect(imported["kept"] + imported["requantised"] + imported["from_backbone"] == 14, f"{imported}")
    expect(0 <= imported["relative_squared_error"] < 0.2, f"{imported}")
    return ACCEPTED


def change(path: Path, random: Random) -> None:
    kind, config, weights = random.randrange(10), path / "config.json", path / "model.safetensors"
    document = json.loads(config.read_text())
    if kind < 4:
        document["quantization_config"] = mutate_json(random, document["quantization_config"])
        config.write_bytes(dump_json(random, document))
    elif kind < 5:
        config.write_bytes(dump_json(random, mutate_json(random, document)))
    elif kind < 6:
        weights.write_bytes(mutate_bytes(random, weights.read_bytes()))
    elif kind < 9:
        data = weights.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = dump_json(random, mutate_json(random, json.loads(data[8 : 8 + length])))
        weights.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    else:
        replace_file(random, random.choice((config, weights)))


def changed_gguf(random: Random, data: bytes, header: int) -> bytes:
    """Mostly the header, and there mostly as long as it was."""
    kind = random.randrange(4)
    if kind == 0:
        return mutate_bytes(random, data)
    if kind == 1:
        return mutate_bytes(random, data[:header]) + data[header:]
    changed = bytearray(data)
    for _ in range(random.choice((1, 2, 8))):
        changed[random.randrange(header)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(changed)
