"""`river info`: facts of this installation, and of a model, whose weights are not read or not even there."""

from dataclasses import asdict, replace

import torch

from river_ext import __version__, ops
from river_ext.errors import RiverError
from river_ext.loading.chat import template_names
from river_ext.loading.checkpoint import load_checkpoint, lone_config
from river_ext.loading.config import ModelConfig, read_config_file
from river_ext.loading.families import FAMILIES, MULTIMODAL
from river_ext.loading.sizes import kv_bytes_per_token, model_bytes, parameters
from river_ext.loading.tokenizer import load_tokenizer
from river_ext.loading.weights import BlockShape
from river_ext.quant.exit_river import load_river, read_facts

from . import shared
from .shared import dtype_name, threads
from .terminal import print_json, printable, size_text


def run(arguments) -> None:
    build = ops._C.build_info()
    gpus = [_gpu_facts(index, build, ops._C) for index in range(torch.cuda.device_count())]
    facts = {
        "version": __version__,
        "build": build,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "model_types": [*FAMILIES, *MULTIMODAL],
        "max_prompts": ops.MAX_ROWS,
    }
    torch_cuda = f"has CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
    reason = build.get("cuda_note") or f"built without them; torch {torch_cuda}"
    lines = {
        "river_ext": __version__,
        "CUDA kernels": f"for {', '.join(_compiled(build))}" if build["cuda"] else f"none ({reason})",
        "CPU kernels": f"{build['cpu_isa']}, {threads()}",
        "torch": torch.__version__,
        "GPU": ", ".join(f"{gpu['name']} ({gpu['arch']}): {gpu['runs']}" for gpu in gpus) or "none",
        "model types": ", ".join(facts["model_types"]),
        "prompts": f"up to {ops.MAX_ROWS} at a time",
    }
    if arguments.demo or arguments.model is not None:
        model_facts, model_lines = _model_facts(arguments)
        facts["model"] = model_facts
        lines |= model_lines
    if arguments.json:
        print_json(facts)
        return
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        print(f"{name:{width}}{printable(str(value))}")


def _compiled(build: dict) -> list[str]:
    """The architectures that the CUDA kernels were compiled for, in the compiler's names."""
    names = []
    for arch in build["cuda_archs"].split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        names.append("sm_" + ("90a" if number == "90" else number))
        if arch.endswith("+PTX"):
            names.append("compute_" + number.rstrip("af"))
    return names


def _gpu_facts(index: int, build: dict, module) -> dict:
    """A GPU, and which of the compiled kernels it will run."""
    major, minor = torch.cuda.get_device_capability(index)
    facts = {"name": torch.cuda.get_device_name(index), "arch": f"sm_{major}{minor}"}
    if not build["cuda"]:
        return facts | {"runs": "no kernels in this build"}
    with torch.cuda.device(index):
        image = module.cuda_image()
    return facts | {"runs": _runs(facts["arch"], image, _compiled(build))}


def _runs(arch: str, image: dict, compiled: list[str]) -> str:
    if image["code"] is None:
        return f"no kernels for {arch}: compiled for {', '.join(compiled)}"
    ready = [name for name in compiled if name.rstrip("af") == f"sm_{image['code']}"]
    return (
        f"machine code for {ready[0]}" if ready else f"PTX for compute_{image['ptx']}, compiled by the driver"
    )


def _model_facts(arguments) -> tuple[dict, dict]:
    """The facts of a model for JSON and as lines: of a checkpoint, whose weights are mapped and not read, or
    of a config.json that lies alone."""
    alone = lone_config(shared.directory(arguments))
    if alone is None:
        checkpoint = load_checkpoint(shared.directory(arguments), check_finite=False)
        directory, config = checkpoint.directory, checkpoint.config
        fingerprint, tokenizer = checkpoint.fingerprint, checkpoint.tokenizer
    elif arguments.river is not None:
        raise RiverError(f"--river belongs to the weights of a model, and {alone.parent} has none")
    else:
        directory, config, fingerprint = alone.parent, read_config_file(alone), None
        tokenizer = load_tokenizer(directory)
        config = replace(config, dtype=config.dtype or torch.bfloat16)  # what most are stored in
    facts = {
        "directory": str(directory),
        "fingerprint": fingerprint,
        "config": asdict(config) | {"dtype": dtype_name(config)},
        "max_length": config.max_length,
        "tokenizer": tokenizer is not None,
        "chat_templates": template_names(directory),
        "parameters": parameters(config),
        "bytes": model_bytes(config),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "padding": {name: list(pad) for name, pad in BlockShape.of(config).padding().items()},
    }
    lines = _model_lines(config, facts)
    if arguments.river is not None:
        facts["river"], river_lines = _river_facts(arguments.river, config, fingerprint)
        lines |= river_lines
    return facts, lines


def _river_facts(directory, config: ModelConfig, fingerprint: str) -> tuple[dict, dict]:
    """The same of a saved river."""
    river = load_river(directory, config, fingerprint)  # refuses one of another model
    saved, has_head = read_facts(directory), river.lm_head is not None
    head = "with" if has_head else "without"
    lines = {
        "saved river": f"{directory}: {saved['quantiser']}, groups of {saved['group_size']}, {head} a head"
    }
    if imported := saved.get("imported"):
        files = ", ".join(f"{name} (sha256 {digest[:16]})" for name, digest in imported["files"].items())
        lines["imported"] = shared.import_line(imported)
        lines["imported files"] = files
    if calibration := saved.get("calibration"):
        lines["calibrated"] = (
            f"{calibration['agreement']:.1%} of next tokens as at full depth, not calibrated "
            f"{calibration['agreement_before']:.1%}"
        )
    return {"directory": str(directory), "lm_head": has_head} | saved, lines


def _model_lines(config: ModelConfig, facts: dict) -> dict[str, str]:
    sizes = {part: size_text(size) for part, size in facts["bytes"].items()}
    share = facts["bytes"]["river"] / facts["bytes"]["backbone"]
    heads = (
        f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}"
    )
    rope = (config.rope_scaling or {}).get("rope_type", "default")
    tied = "tied" if config.tie_word_embeddings else "own"
    padding = [
        f"{name} {rows} rows and {columns} columns"
        for name, (rows, columns) in facts["padding"].items()
        if rows or columns
    ]
    return {
        "model": facts["directory"],
        "fingerprint": facts["fingerprint"] or "none: the weights are not there",
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers, "
        f"hidden {config.hidden_size}, {heads}, inner {config.intermediate_size}",
        "vocabulary": f"{config.vocab_size}, {tied} head, "
        + ("tokenizer.json" if facts["tokenizer"] else "no tokenizer.json: token ids only"),
        "chat template": ", ".join(facts["chat_templates"]) or "none: prompts are text or token ids",
        "positions": f"{config.max_length}, rope {rope}, theta {config.rope_theta:g}{_attention(config)}",
        "parameters": f"{facts['parameters']:,}",
        "weights": f"{dtype_name(config)}: backbone {sizes['backbone']}, "
        f"embedding and head {sizes['embedding_and_head']}",
        "river": f"{sizes['river']}, {share:.0%} of the backbone's layers; its head {sizes['river_head']}",
        "river's padding": ", ".join(padding) or "none",
        "KV cache": f"{size_text(facts['kv_bytes_per_token'])} a token, "
        f"{size_text(1000 * facts['kv_bytes_per_token'])} for 1,000",
    }


def _attention(config: ModelConfig) -> str:
    """What some or all layers do otherwise, as more of a line."""
    layers, parts = config.num_hidden_layers, []
    if config.sliding_window is not None:
        windowed = layers - len(config.full_attention_layers)
        parts.append(f"a window of {config.sliding_window} in {windowed} of {layers} layers")
    if config.nope_layers:
        parts.append(f"no rope in {len(config.nope_layers)} of {layers} layers")
    return "".join(f", {part}" for part in parts)
