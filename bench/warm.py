"""Loads what the parts of the GPU suite import and makes a context, so that nobody measures a cold disk."""

import importlib
import importlib.util
import time

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "rich", "pytest", "xdist", "triton")

start = time.perf_counter()
for name in PACKAGES:
    if importlib.util.find_spec(name):
        importlib.import_module(name)
import torch  # noqa: E402

x = torch.randn(256, 256, device="cuda").bfloat16()
(x @ x).sum().item()  # cuBLAS is a library of its own
print(f"torch {torch.__version__} and a context after {time.perf_counter() - start:.1f} s", flush=True)
