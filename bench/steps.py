"""Whole decoding steps: random weights in the shapes of Llama-3.2-1B and Llama-3.1-8B, against the budgets.

Three times per exit depth, context and batch:
  kernels   the layers of that depth and the head in one graph: no decision, and nothing handed to a next step
  device    a whole step of device control, replayed: decisions, token, embedding and record on the GPU too
  host      a token of `generate` with host control (and with device control, as a user gets it), wall clock
What device control costs is `device` - `kernels`. Floors count the weights and the cache once, at 4.3 TB/s.
A fixed depth d is threshold -2 with min_layers d; full bf16 is threshold inf; full W4 is limit 0.
"""

import math
import statistics

import gpu
import torch
from gpu import Time
from models import (
    BUDGETS,
    CONFIGS,
    CONTROL_BUDGET_US,
    Budget,
    exit_depths,
    fill_cache,
    floor_us,
    random_network,
    step_bytes,
)

from river_ext import ops
from river_ext.generate import generate
from river_ext.graph import Runner, whole_step
from river_ext.network import Network
from river_ext.request import Options

MARGIN = 64  # positions of the cache past the context; every replay takes one
TOKENS = (33, 97)  # generate's new tokens, short and long: the difference is decoding alone


class Step:
    """The state of a decoding step at one context and batch, and its graphs."""

    def __init__(self, network: Network, rows: int, context: int):
        self.network, self.context, self.rows = network, context, rows
        self.runner = Runner(network, rows, context + MARGIN, 16)
        fill_cache(self.runner.cache)
        self.tokens = torch.randint(0, network.config.vocab_size, (rows,), device=network.device)
        self.layers = network.config.num_hidden_layers
        self.set_depth(self.layers)
        self.graph = gpu.capture(torch.inference_mode()(lambda: whole_step(network, self.runner)))

    def set_depth(self, depth: int) -> None:
        """By the rule itself, as a caller would."""
        runner = self.runner
        runner.limit.fill_(self.layers if depth else 0)
        runner.thresholds.fill_(-2.0 if depth < self.layers else math.inf)
        runner.min_layers.fill_(max(depth, 1))
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        runner = self.runner
        runner.hidden.copy_(self.network.embed(self.tokens))
        runner.slots.copy_(torch.arange(self.rows))
        runner.positions.fill_(self.context)
        runner.draw_positions.fill_(self.context + 1)
        runner.remaining.fill_(1 << 30)
        runner.stop_tokens.fill_(-1)
        runner.temperature.zero_()
        for state in (runner.exited, runner.steps_taken):
            state.zero_()

    def device_time(self, depth: int, repeats: int) -> Time:
        self.set_depth(depth)
        time = gpu.time_graph(self.graph, 1, repeats, self.reset)
        taken = int(self.runner.steps_taken.item())
        got = self.runner.records[(taken - 1) % len(self.runner.records)][:2].tolist()
        if got != [taken, depth]:
            raise SystemExit(
                f"steps: the device took step {got[0]} at depth {got[1]}, not {taken} at {depth}"
            )
        return time

    @torch.inference_mode()
    def kernels_time(self, depth: int, repeats: int) -> Time:
        network, runner, eps = self.network, self.runner, self.network.config.rms_norm_eps

        def run() -> None:
            hidden = runner.hidden
            for index in range(self.layers):
                layer = network.decoder_block if index < depth else network.exit_layer
                hidden, _ = layer(index, hidden, *runner.place)
            ops.lm_head(hidden, network.norm, network.lm_head, eps, return_logits=False)

        self.reset()
        return gpu.time_graph(gpu.capture(run), 1, repeats)


def options_at(depth: int, layers: int, **more) -> Options:
    if depth == 0:
        return Options(mode="full_w4", stop_tokens=(), **more)
    if depth == layers:
        return Options(mode="full", stop_tokens=(), **more)
    return Options(threshold=-2.0, min_layers=depth, stop_tokens=(), **more)


def generate_us(network: Network, depth: int, context: int, control: str, repeats: int) -> float:
    """Wall clock of a token at about this context, batch 1: long runs less short ones."""
    prompt = torch.randint(0, network.config.vocab_size, (context - TOKENS[0],)).tolist()
    layers = network.config.num_hidden_layers

    def seconds(count: int) -> float:
        options = options_at(depth, layers, max_new_tokens=count, exit_control=control)
        output = generate(network, None, prompt, options)
        depths = set(output.exit_depths[1:])
        if depths != {depth}:
            raise SystemExit(f"steps: {control} control exited at {sorted(depths)}, not at {depth}")
        return output.stats.decode_seconds

    short, long = TOKENS
    seconds(long)  # captures
    differences = [seconds(long) - seconds(short) for _ in range(repeats)]
    return 1e6 * statistics.median(differences) / (long - short)


def measure(
    model: str, network: Network, rows: int, context: int, depths: list[int], repeats: int
) -> list[dict]:
    step, lines = Step(network, rows, context), []
    for depth in depths:
        kernels, device = step.kernels_time(depth, repeats), step.device_time(depth, repeats)
        size = step_bytes(network.config, depth, context, rows)
        line = {
            "model": model, "depth": depth, "context": context, "rows": rows, "bytes": size,
            "floor_us": floor_us(network.config, depth, context, rows),
            "kernels": kernels.fields(), "device": device.fields(), "control_us": device.us - kernels.us,
            "gb_s": size / device.us / 1e3, "tokens_per_second": rows * 1e6 / device.us,
        }  # fmt: skip
        lines.append(line)
        print(
            f"{model} depth {depth:>2} context {context:>4} T={rows}: kernels {kernels.us:7.0f} us, "
            f"device {device.us:7.0f} us, {line['gb_s']:5.0f} GB/s, {device.us / line['floor_us']:.2f} x "
            f"floor, control {line['control_us']:5.1f} us (spread {device.spread_percent:.1f} %)",
            flush=True,
        )
    return lines


def budget_line(budget: Budget, lines: list[dict], control: dict[str, float]) -> dict:
    """A row of the design's table; None where it was not measured."""
    at = {line["context"]: line for line in lines if line["model"] == budget.model
          and line["depth"] == budget.depth and line["rows"] == 1}  # fmt: skip
    here, short = at.get(1024), at.get(32)
    device, kernels = (here and here[name]["us"] for name in ("device", "kernels"))
    return {
        **vars(budget), "device_us": device, "device_us_context_32": short and short["device"]["us"],
        "kernels_us": kernels, "control_us": here and here["control_us"], "generate_us": control,
        "host_control_us": control["host"] - kernels if here and "host" in control else None,
        "within_stage_a": device and device <= budget.stage_a_us,
    }  # fmt: skip


def table(budgets: list[dict]) -> str:
    def us(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    head = (
        "| batch 1, context 1k, us | floor | budget | measured | at context 32 | kernels | generate, host | "
    )
    head += "generate, device | best public |\n|" + "---|" * 9
    rows = [
        f"| {b['model']}, exit depth {b['depth']} | {us(b['floor_us'])} | {us(b['stage_a_us'])} | "
        f"{us(b['device_us'])} | {us(b['device_us_context_32'])} | {us(b['kernels_us'])} | "
        f"{us(b['generate_us'].get('host'))} | {us(b['generate_us'].get('device'))} | {b['best_public']} |"
        for b in budgets
    ]
    return "\n".join([head, *rows])


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    p.add_argument("--contexts", type=int, nargs="+", default=[32, 1024, 8192])
    p.add_argument("--rows", type=int, nargs="+", choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    p.add_argument("--depths", type=int, nargs="+", help="exit depths (default: all of the table)")
    p.add_argument("--no-generate", action="store_true", help="leave out the wall clock of generate")
    p.add_argument("--repeats", type=int, default=10)
    args = p.parse_args()
    if args.repeats > MARGIN // 2:
        p.error(f"--repeats {args.repeats}; accepted: up to {MARGIN // 2}")
    if args.quick:
        args.contexts, args.rows = [32, 1024], [1]
    gpu.require_cuda()
    lines, budgets, clocks = [], [], {}
    for model in args.models:
        network, config = random_network(CONFIGS[model]), CONFIGS[model]
        wanted = [budget for budget in BUDGETS if budget.model == model]
        depths = args.depths or ([b.depth for b in wanted] if args.quick else exit_depths(config))
        for context in args.contexts:
            for rows in args.rows:
                lines += measure(model, network, rows, context, depths, args.repeats)
        for budget in wanted:
            measured = {}
            for control in () if args.no_generate else ("host", "device"):
                measured[control] = generate_us(network, budget.depth, 1024, control, repeats=3)
            budgets.append(budget_line(budget, lines, measured))
        step = Step(network, 1, 32)
        clocks[model] = gpu.clocks_under_load(step.graph)
        del network, step
        torch.cuda.empty_cache()
    print(table(budgets))
    found = {"clocks": clocks, "budgets": budgets, "control_budget": CONTROL_BUDGET_US, "steps": lines}
    gpu.save("steps", args, found)


if __name__ == "__main__":
    main()
