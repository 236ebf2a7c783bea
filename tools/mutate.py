"""Plants mistakes of the kind a person makes, one at a time, and says which the tests let through.

    python tools/mutate.py [--list] [NAME ...]

mutants.py lists them: each is an edit and the check that must fail on it, a pytest selection, or "gate" and a
kernel's file. To add one: pick a property that no test seems to hold, write the edit, see it survive, write
the test. Runs on demand (minutes: edits of C++ are compiled), in the tree as it is, and leaves it so.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
BUILT = (".cpp", ".h", ".cu", ".cuh")


def survives(mutant: Mutant) -> bool:
    """Whether the check passes with the edit in place."""
    path = ROOT / mutant.file
    original = path.read_bytes()
    text = original.decode()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}, not once")
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        if not built(path):  # nothing was tested
            sys.exit(f"{mutant.name}: {mutant.file} does not compile with it")
        return passes(mutant.check)
    finally:
        path.write_bytes(original)
        built(path)


def built(path: Path) -> bool:
    """The extension with this file as it is. The tests build the emulated GPU themselves."""
    if path.suffix not in BUILT:
        return True
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def passes(check: str) -> bool:
    words = check.split()
    if words[0] == "gate":
        command = [sys.executable, "tools/compile_gate.py", "--archs", "90a", *words[1:]]
    else:
        files = [
            str(*(ROOT / "python_tests").rglob(word)) if word.endswith(".py") else word for word in words
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if words[0] != "gate" and done.returncode in (4, 5):  # a command line pytest refuses, and no tests
        sys.exit(f"{check}: selects no test\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", metavar="NAME", help="of mutants, or parts of names (default: all)")
    p.add_argument("--list", action="store_true", help="name the mutants and end")
    args = p.parse_args()
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if not chosen:
        p.error(f"no mutant {args.names[0]!r}; --list names them")
    survivors = []
    for mutant in chosen:
        if args.list:
            print(f"{mutant.name:36} {mutant.file}")
            continue
        survived = survives(mutant)
        survivors += [mutant.name] if survived else []
        print(f"{'SURVIVED' if survived else 'caught':9} {mutant.name}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
