"""What a threshold costs on a checkpoint: exit depth, agreement with full depth, KL and speed.

Full depth continues every prompt of each file (--prompts: JSON lines with a field "question", "prompt" or
"text"), greedily, batch 1. Every setting is then fed that text, token by token:

- depth: the mean exit depth of its decoded tokens; prompt: the mean depth at which the prompts ran;
- same: the share of tokens that it would have drawn at the same place;
- KL: mean KL(full depth || setting) of the next token, in nats.

Then some settings generate freely, in turns: x is the speed over full depth, the median of the prompts. From
full depth come also, for each layer, percentiles of the similarity of its decoded tokens.

    python -m bench.cpu.thresholds --model DIR --prompts FILE... --chat
    python -m bench.cpu.thresholds --plot RESULTS.json FIGURE.svg    (needs matplotlib)
"""

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import torch

import river_ext
from bench.lib import figures
from bench.lib.common import machine, parser, results_path, save
from bench.lib.figures import BLUE, GREY, ORANGE
from bench.lib.prompts import add_prompts, read_prompts
from river_ext.evaluation.measure import kl_divergence
from river_ext.model import Model

THRESHOLDS = (0.3, 0.5, 0.8, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
POLICY_THRESHOLDS = (0.5, 0.9, 0.98)  # at which the prompt's policies are compared
FREE_THRESHOLDS = (0.5, 0.9, 0.95, 0.98)
PERCENTILES = (5, 25, 50, 75, 95)
MODES = {"full depth": {"mode": "full"}, "full W4": {"mode": "full_w4"}}


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    add_prompts(p, count=10)
    p.add_argument("--free-count", type=int, default=4, help="of these, that are generated freely")
    p.add_argument("--new-tokens", type=int, default=48)
    p.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "FIGURE"), help="only draw a figure")
    args = p.parse_args()
    if args.plot:
        return plot(*args.plot)
    if args.model is None or not args.prompts:
        p.error("what to measure on; accepted: --model DIR --prompts FILE..., or --plot RESULTS FIGURE")
    torch.set_num_threads(args.threads)
    path = results_path("thresholds", args)
    model = river_ext.load(args.model, river=args.river)
    files = {file.name: read_prompts(file, args.count, args.chat) for file in args.prompts}
    texts = full_depth(model, list(chain.from_iterable(files.values())), args.new_tokens)
    timed = list(chain.from_iterable(prompts[: args.free_count] for prompts in files.values()))
    result = {
        "machine": machine(),
        "model": args.model.name,
        "layers": model.config.num_hidden_layers,
        "files": {name: len(prompts) for name, prompts in files.items()},
        "chat": args.chat,
        "free_count": args.free_count,
        "new_tokens": args.new_tokens,
        "similarity": similarity_percentiles(texts),
        "forced": forced(model, texts),
        "free": free(model, timed, args.new_tokens),
    }
    print(save(path, result))


# --- fed with the text of full depth ------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What full depth made of a prompt, and why."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor  # fp32 [len(tokens), vocab_size]
    similarities: list[list[float]]  # [len(tokens)][layers]


def full_depth(model: Model, prompts: list, new_tokens: int) -> list[Text]:
    texts = []
    for prompt in prompts:
        prompt = model.text.encode(prompt) if isinstance(prompt, str) else model.text.chat(prompt)
        out = model.generate(prompt, mode="full", max_new_tokens=new_tokens, return_logits=True)
        texts.append(Text(prompt, out.tokens, out.logits, out.similarities))
    return texts


def similarity_percentiles(texts: list[Text]) -> dict[str, list[float]]:
    """By percentile, the similarity after each layer."""
    decoded = [row for text in texts for row in text.similarities[1:]]  # the first is the prompt's
    quantiles = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    values = torch.tensor(decoded, dtype=torch.float64).quantile(quantiles, dim=0)
    return {
        str(p): [round(value, 4) for value in row.tolist()]
        for p, row in zip(PERCENTILES, values, strict=True)
    }


def settings(layers: int) -> dict[str, dict]:
    """Options by name: thresholds after a full prompt, and at some of them the prompt's other policies."""
    river = {f"River {t:g}": {"threshold": t, "prefill": "full"} for t in THRESHOLDS}
    policies = (f"depth:{layers // 4}", f"depth:{layers // 2}", "min", "last")
    others = {
        f"River {t:g}, {p}": {"threshold": t, "prefill": p} for t in POLICY_THRESHOLDS for p in policies
    }
    return {"full W4": MODES["full W4"]} | river | others


@dataclass
class Tally:
    same: list[bool] = field(default_factory=list)  # by token
    kl: list[float] = field(default_factory=list)  # by token
    depths: list[int] = field(default_factory=list)  # by decoded token
    prompt_depths: list[int] = field(default_factory=list)  # by prompt

    def add(self, text: Text, score) -> None:
        self.same += (score.logits.argmax(-1) == torch.tensor(text.tokens)).tolist()
        self.kl += kl_divergence(text.logits, score.logits).tolist()
        self.prompt_depths.append(score.exit_depths[0])
        self.depths += score.exit_depths[1:]


def forced(model: Model, texts: list[Text]) -> list[dict]:
    lines = []
    print(f"{'':<22}{'depth':>7}{'prompt':>8}{'same':>8}{'KL':>9}")
    for name, options in settings(model.config.num_hidden_layers).items():
        tally = Tally()
        for text in texts:
            tally.add(text, model.score(text.prompt + text.tokens, prompt_length=len(text.prompt), **options))
        line = {
            "setting": name,
            **options,
            "tokens": len(tally.same),
            "exit_depth": fmean(tally.depths),
            "prompt_depth": fmean(tally.prompt_depths),
            "same": fmean(tally.same),
            "kl": fmean(tally.kl),
        }
        lines.append(line)
        print(
            f"{name:<22}{line['exit_depth']:7.2f}{line['prompt_depth']:8.2f}{line['same']:8.1%}{line['kl']:9.4f}",
            flush=True,
        )
    return lines


# --- free -----------------------------------------------------------------------------------------------


def free(model: Model, prompts: list, new_tokens: int) -> list[dict]:
    river = {f"River {t:g}": {"threshold": t} for t in FREE_THRESHOLDS}
    speeds = {name: [] for name in MODES | river}
    for prompt in prompts:
        for name, options in (MODES | river).items():  # in turns, so that a slow minute hits all alike
            out = model.generate(prompt, max_new_tokens=new_tokens, **options)
            speeds[name].append(out.stats.tokens_per_second)
    full, lines = speeds["full depth"], []
    print(f"\n{'':<22}{'tok/s':>8}{'x':>7}")
    for name, values in speeds.items():
        x = median(value / reference for value, reference in zip(values, full, strict=True))
        lines.append({"setting": name, "tokens_per_second": median(values), "x_full_depth": x})
        print(f"{name:<22}{median(values):8.1f}{x:7.2f}")
    return lines


# --- the figure ---------------------------------------------------------------------------------------------


def plot(results: Path, figure: Path) -> None:
    """Three panels: similarity by layer, exit depth by threshold, agreement by threshold and policy."""
    pyplot = figures.pyplot()
    result = json.loads(results.read_text())
    drawn, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    similarity_panel(panels[0], result)
    depth_panel(panels[1], result)
    agreement_panel(panels[2], result)
    figures.save(drawn, figure, [results])


def similarity_panel(axes, result: dict) -> None:
    layers = range(1, result["layers"] + 1)
    low, lower, middle, upper, high = (result["similarity"][str(p)] for p in PERCENTILES)
    axes.fill_between(layers, low, high, color=BLUE, alpha=0.2, linewidth=0, label="90 % of tokens")
    axes.fill_between(layers, lower, upper, color=BLUE, alpha=0.4, linewidth=0, label="50 %")
    axes.plot(layers, middle, color=BLUE, label="median")
    axes.set(xlabel="layer", title="similarity at full depth", ylim=(0.5, 1.0))
    axes.legend(loc="lower center", frameon=False)


def depth_panel(axes, result: dict) -> None:
    lines = by_policy(result)["full"]
    axes.plot(thresholds_of(lines), [line["exit_depth"] for line in lines], "o-", color=BLUE)
    axes.set(xlabel="threshold", title=f"mean exit depth, of {result['layers']}", ylim=(0, result["layers"]))


def agreement_panel(axes, result: dict) -> None:
    for (policy, lines), marker in zip(by_policy(result).items(), "osD^v", strict=True):
        style = {"linestyle": "-" if policy == "full" else "", "color": BLUE if policy == "full" else ORANGE}
        same = [100 * line["same"] for line in lines]
        axes.plot(thresholds_of(lines), same, marker, label=f"prefill {policy}", **style)
    (w4,) = (line for line in result["forced"] if line["setting"] == "full W4")
    axes.axhline(100 * w4["same"], color=GREY, linestyle=":", label="full W4")
    axes.set(xlabel="threshold", title="same token as full depth, %")
    axes.legend(frameon=False)


def thresholds_of(lines: list[dict]) -> list[str]:
    """As names, which stand at equal distances: most of what happens is close to 1."""
    return [f"{line['threshold']:g}" for line in lines]


def by_policy(result: dict) -> dict[str, list[dict]]:
    """The lines of the river, by the prompt's policy; `full`, which has all thresholds, comes first."""
    lines: dict[str, list[dict]] = {}
    for line in result["forced"]:
        if "prefill" in line:
            lines.setdefault(line["prefill"], []).append(line)
    return lines


if __name__ == "__main__":
    main()
