"""Where tests run, and tiny checkpoints, written where a test asks for them.

Tests of CUDA code take the fixture `kernels` or `device`. Their GPU half exists where a GPU is, or where
RIVER_REQUIRE_CUDA=1 says that there must be one; elsewhere there is nothing to skip, and the header says so.
"""

import fcntl
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)

CUDA_REQUIRED = os.environ.get("RIVER_REQUIRE_CUDA") == "1"


def cuda_missing() -> str:
    """Why nothing can run on a GPU, or ""."""
    from river_ext import ops  # noqa: F401

    if not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("river::decoder_block", "CUDA"):
        return "the extension was built without CUDA kernels"
    return ""


CUDA_MISSING = cuda_missing()
GPU = ["cuda"] if CUDA_REQUIRED or not CUDA_MISSING else []
collect_ignore = [] if GPU else ["cuda/test_gpu.py"]


def pytest_report_header():
    return "GPU: " + (torch.cuda.get_device_name() if not CUDA_MISSING else f"no tests ({CUDA_MISSING})")


def on_gpu_if(name: str) -> str:
    if name == "cuda" and CUDA_MISSING:
        pytest.fail(f"needs a GPU: {CUDA_MISSING}", pytrace=False)
    return name


@pytest.fixture(params=["cpu", *GPU])
def device(request):
    """A device name."""
    return on_gpu_if(request.param)


@pytest.fixture(params=["emulated", *GPU])
def kernels(request):
    """The ops by the CUDA kernels, for tensors on the CPU: emulated_ops or gpu_ops."""
    return importlib.import_module({"emulated": "emulated_ops", "cuda": "gpu_ops"}[on_gpu_if(request.param)])


TINY_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_tiny_checkpoint(directory: Path, seed: int = 0, **changes) -> Path:
    """A random checkpoint: model.safetensors, and config.json of TINY_CONFIG with changes (None: no key)."""
    from river_ext.loading.checkpoint import tensor_shapes
    from river_ext.loading.config import read_config

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (TINY_CONFIG | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    config = read_config(directory)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: ((1.0 if len(shape) == 1 else 0.0) + 0.15 * torch.randn(shape, generator=generator)).to(
            config.dtype
        )
        for name, shape in tensor_shapes(config).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def random_hf_model(model_type: str = "llama", seed: int = 0, **changes):
    """A random model of transformers. Weights are wide enough for text that does not repeat."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {
        key: value
        for key, value in TINY_CONFIG.items()
        if key not in ("model_type", "torch_dtype", "rope_theta")
    }
    config = transformers.AutoConfig.for_model(model_type, **(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif name.endswith("embed_tokens.weight"):  # small, or a tied head would repeat the last token
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:  # outputs of a projection of unit inputs have about unit size
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model.eval()


def write_hf_checkpoint(directory: Path, model_type: str = "llama", seed: int = 0, **changes) -> Path:
    """A random model saved by transformers itself."""
    random_hf_model(model_type, seed, **changes).save_pretrained(directory)
    return Path(directory)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """Factory: tiny_checkpoint(**config changes) -> directory of a random checkpoint."""
    return lambda name="checkpoint", **options: write_tiny_checkpoint(tmp_path / name, **options)


@pytest.fixture
def hf_checkpoint(tmp_path):
    """Factory: hf_checkpoint(model_type, **config changes) -> directory of a checkpoint by transformers."""
    return lambda model_type="llama", **options: write_hf_checkpoint(tmp_path / "hf", model_type, **options)


@pytest.fixture(scope="session")
def real_model():
    """Directory of a trained chat model that tools/real_model.py makes, once for all sessions."""
    root = Path(__file__).resolve().parent.parent
    named = os.environ.get("RIVER_REAL_MODEL")
    directory = Path(named) if named else root / "build" / "real_model"
    if (directory / "model.safetensors").exists():
        return directory
    (root / "build").mkdir(exist_ok=True)
    with open(root / "build" / "real_model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # sessions beside this one wait, and then find it made
        command = [sys.executable, root / "tools" / "real_model.py", directory]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (pytest.fail if named else pytest.skip)(done.stderr.strip().splitlines()[-1])
    return directory


# --- steps ---


@pytest.fixture
def uncaptured(monkeypatch):
    """Steps on the CPU call their ops each time: for tests that put others in the place of these."""
    from river_ext.engine import graph

    captured = graph.Graph
    monkeypatch.setattr(graph, "Graph", lambda run, _, pool: captured(run, False, pool))


# --- the command `river` ---


@pytest.fixture
def one_demo_model(monkeypatch):
    """Commands that want the plain demo model share one."""
    from tiny_model import demo_model

    from river_cli import shared

    load = shared.load

    def loaded(arguments):
        plain = (arguments.model, arguments.river, arguments.resident_layers or shared.calibrated(arguments))
        machine = (arguments.device, arguments.dtype)
        return demo_model() if (plain, machine) == ((None,) * 3, ("auto",) * 2) else load(arguments)

    monkeypatch.setattr(shared, "load", loaded)


@pytest.fixture
def river(capsys, one_demo_model):
    """Runs a command: (exit code, standard output, standard error)."""
    import river_cli

    def run(*arguments):
        code = river_cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def river_json(river):
    """Runs a command with --json that succeeds: the document."""

    def run(*arguments):
        code, out, err = river(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=pytest.fail)

    return run


@pytest.fixture
def refused(river):
    """Runs a command that fails: its one line, without the prefix."""

    def run(*arguments):
        code, out, err = river(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("river: error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("river: error: ").strip()

    return run


@pytest.fixture
def short_answers(monkeypatch):
    monkeypatch.setattr("river_ext.evaluation.measure.DEMO_NEW_TOKENS", 6)
