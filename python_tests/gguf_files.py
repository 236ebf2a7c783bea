"""GGUF files of tiny models, written byte by byte as the format's specification has it."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
PERMUTED = ("attn_q", "attn_k")
ALIGNMENT = 32
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
AROUND = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if name in AROUND:
        return AROUND[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, last = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{last}"


def permuted(tensor, heads):
    """The rows of q or k as llama.cpp orders them: the two that rotate together are neighbours."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item) -> tuple[int, bytes]:
    """(type, bytes)."""
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, string(item)
    kinds, parts = zip(*map(value, item), strict=True)
    return 9, struct.pack("<IQ", kinds[0], len(item)) + b"".join(parts)


def encoded(tensor, kind: str) -> tuple[bytes, torch.Tensor]:
    """A tensor's bytes, and its values once it is read again."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in plain:
        stored = tensor.to(plain[kind]).contiguous()
        return bytes(stored.view(torch.uint8).flatten().tolist()), stored.float()
    blocks = tensor.float().reshape(-1, 32)
    fp16 = lambda column: column.half().view(torch.uint8).view(-1, 2)  # noqa: E731
    if kind == "Q8_0":
        step = (blocks.abs().amax(1, keepdim=True) / 127).half()
        q = (blocks / step.float()).round().clamp(-127, 127)
        parts, values = [fp16(step), q.to(torch.int8).view(torch.uint8)], q * step.float()
    else:
        low = blocks.amin(1, keepdim=True).half()
        step = ((blocks.amax(1, keepdim=True) - low.float()) / 15).half()
        if kind == "Q4_0":
            step = (blocks.abs().amax(1, keepdim=True) / -8).half()
        offset = low.float() if kind == "Q4_1" else -8 * step.float()
        q = ((blocks - offset) / step.float()).round().clamp(0, 15)
        nibbles = q.to(torch.uint8)
        parts = [fp16(step), *([fp16(low)] if kind == "Q4_1" else []), nibbles[:, :16] | nibbles[:, 16:] << 4]
        values = q * step.float() + offset
    return bytes(torch.cat(parts, 1).flatten().tolist()), values.view(tensor.shape)


def gguf_bytes(metadata: dict, tensors: dict, version: int = 3) -> bytes:
    """tensors: by name, the shape as torch has it, the number of the type, and the bytes."""
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, item in metadata.items():
        kind, data = value(item)
        head += [string(key), struct.pack("<I", kind), data]
    data = b""
    for name, (shape, kind, stored) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += [string(name), dims, struct.pack("<IQ", kind, len(data))]
        data += stored + bytes(-len(stored) % ALIGNMENT)
    head = b"".join(head)
    return head + bytes(-len(head) % ALIGNMENT) + data


def model_parts(model: Path, kinds=lambda name: "F32") -> tuple[dict, dict, dict]:
    """A checkpoint directory as metadata, tensors and what values these have, by the checkpoint's names.

    kinds: the type of each tensor, by its name in the GGUF file; vectors are F32.
    """
    config = json.loads((model / "config.json").read_text())
    architecture = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    facts = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if "head_dim" in config:
        facts |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    metadata = {"general.architecture": architecture, "general.name": "tiny"}
    metadata |= {f"{architecture}.{key}": item for key, item in facts.items()}
    tensors, values = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stored_name = gguf_name(name)
        kind = kinds(stored_name) if tensor.ndim == 2 else "F32"
        rotated = architecture == "llama" and any(part in stored_name for part in PERMUTED)
        count = kv_heads if "attn_k" in stored_name else heads
        data, read = encoded(permuted(tensor, count) if rotated else tensor, kind)
        tensors[stored_name] = (tuple(tensor.shape), KINDS[kind], data)
        if rotated:  # back: the first half of a head are its even rows
            read = read.view(count, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        values[name] = read
    return metadata, tensors, values
