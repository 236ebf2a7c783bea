"""The paper's figures on a checkpoint of one's own: similarity, K and V, drift, speed against agreement.

    python -m bench.figures.paper --model DIR --prompts FILE... --chat        measures for bench/results
    python -m bench.figures.paper --plot RESULTS.json THRESHOLDS.json FOLDER  draws all of them (matplotlib)

Similarity by layer, and speed against agreement, are drawn from what bench/cpu/thresholds.py has measured.
"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

import river_ext
from bench.cpu import thresholds
from bench.figures import caches, drift, front
from bench.lib import figures
from bench.lib.common import machine, parser, results_path, save
from bench.lib.prompts import add_prompts, read_prompts

DEPTHS = list(range(1, 9))  # where tokens leave, for Fig. 7


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    add_prompts(p, count=3)
    p.add_argument("--new-tokens", type=int, default=40)
    p.add_argument("--long-count", type=int, default=1, help="of these, that are generated at length")
    p.add_argument("--long-tokens", type=int, default=256)
    p.add_argument(
        "--plot", type=Path, nargs=3, metavar=("RESULTS", "THRESHOLDS", "FOLDER"), help="only draw"
    )
    args = p.parse_args()
    if args.plot:
        *sources, folder = args.plot
        for name in DRAWN:
            plot(name, *sources, folder / f"{name}.svg")
        return
    if args.model is None or not args.prompts:
        p.error("what to measure on; accepted: --model DIR --prompts FILE..., or --plot")
    torch.set_num_threads(args.threads)
    path = results_path("paper", args)
    model = river_ext.load(args.model, river=args.river)
    files = {file.name: read_prompts(file, args.count, args.chat) for file in args.prompts}
    prompts = list(chain.from_iterable(files.values()))
    long = list(chain.from_iterable(found[: args.long_count] for found in files.values()))
    print(save(path, measure(model, prompts, long, args) | {"files": {n: len(f) for n, f in files.items()}}))


def measure(model, prompts: list, long: list, args) -> dict:
    layers = model.config.num_hidden_layers
    texts = thresholds.full_depth(model, prompts, args.new_tokens)
    depths = [depth for depth in DEPTHS if depth < layers]
    found = caches.measure(model, texts, depths, sorted({2, layers // 4, layers // 2}))
    print(f"{'depth':<8}{'r':>8}")
    for line in found["values"]:
        print(f"{line['depth']:<8}{line['r']:8.3f}", flush=True)
    drifting = drift.measure(model, thresholds.full_depth(model, long, args.long_tokens))
    for line in drifting["settings"]:
        print(
            f"{line['setting']:<12}KL {line['kl'][0]:.4f} at first, {line['kl'][-1]:.4f} at last", flush=True
        )
    return {
        "machine": machine(),
        "model": args.model.name,
        "layers": layers,
        "chat": args.chat,
        "new_tokens": args.new_tokens,
        **found,
        "drift": drifting,
    }


# --- drawing ------------------------------------------------------------------------------------------------

# by figure: whether it shows the results of thresholds.py, and what draws its panels
DRAWN: dict[str, tuple[bool, list[Callable]]] = {
    "similarity": (True, [thresholds.similarity_panel]),
    "values": (False, [caches.draw_values, caches.draw_correlations]),
    "kv": (False, [caches.draw_kv]),
    "drift": (False, [drift.draw]),
    "front": (True, [front.draw]),
}


def plot(name: str, results: Path, of_thresholds: Path, figure: Path) -> None:
    """Draws one of DRAWN."""
    uses_thresholds, panels = DRAWN[name]
    source = of_thresholds if uses_thresholds else results
    size = (4.8 * len(panels), 3.4)
    drawn, axes = figures.pyplot().subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for draw, panel in zip(panels, axes[0], strict=True):
        draw(panel, json.loads(source.read_text()))
    figure.parent.mkdir(parents=True, exist_ok=True)
    figures.save(drawn, figure, [results, of_thresholds])


if __name__ == "__main__":
    main()
