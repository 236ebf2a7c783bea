"""Runs areas of the fuzzer, and says what was found and how to see it again."""

import argparse
import sys

from . import AREAS
from .runner import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"{', '.join(AREAS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (0)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="inputs of each area (1000)")
    parser.add_argument("--seconds", type=float, default=20, help="that one input may take (20)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.areas if name not in AREAS]:
        parser.error(f"no area {unknown[0]!r}; accepted: {', '.join(AREAS)}")
    found = False
    for area in arguments.areas or AREAS:
        report = run(area, arguments.seed, arguments.first, arguments.count, arguments.seconds)
        print(
            f"{area:15} {report.refused} refused, {report.accepted} accepted, {len(report.findings)} findings"
        )
        for number, text in report.findings:
            print(f"  {area} --seed {arguments.seed} --first {number} --count 1: {text}")
        found |= bool(report.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
