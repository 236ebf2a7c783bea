"""Loads what the parts of the GPU suite import and makes a context, so that nobody measures a cold disk."""

import contextlib
import importlib
import time

import torch

PACKAGES = ("numpy", "safetensors", "tokenizers", "rich", "pytest", "xdist", "triton")

start = time.perf_counter()
x = torch.randn(256, 256, device="cuda").bfloat16()
(x @ x).sum().item()  # cuBLAS is a library of its own
print(f"torch {torch.__version__}: a context and cuBLAS {time.perf_counter() - start:.1f} s", flush=True)
for name in PACKAGES:
    with contextlib.suppress(Exception):  # who needs one that does not work here will say so
        importlib.import_module(name)
