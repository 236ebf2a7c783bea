"""Whole decoding steps: random weights in the shapes of Llama-3.2-1B and Llama-3.1-8B, against the budgets.

Three times per exit depth, context and batch:
  kernels   the layers of that depth and the head in one graph: no decision, and nothing handed to a next step
  device    a whole step of device control, replayed: decisions, token, embedding and record on the GPU too
  host      a token of `generate` with host control (and with device control, as a user gets it), wall clock
What device control costs is `device` - `kernels`. Floors count the weights and the cache once, at the ring's
read-only ceiling of this very run. A fixed depth d is threshold -2 with min_layers d; full bf16 is threshold
inf; full W4 is limit 0. What the budgets ask comes first, there with every variant beside the default.

Lossless cycles are timed in turns with full bf16 steps of the same requests. Random weights accept hardly a
draft, which changes nothing in a cycle's time; the speed-up follows from that and from an assumed acceptance.
A cycle is one graph, or the host looks at each draft (`exit_control="host"`): what that costs has to be less
than the drafts that it saves.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch

from bench.gpu import ring
from bench.gpu.suite_summary import cycle_lines, step_lines, variant_lines
from bench.lib import clocks, gpu, variants
from bench.lib.gpu import Time
from bench.lib.models import (
    BUDGETS,
    CONFIGS,
    CYCLE_BUDGET,
    Budget,
    cycle_bytes,
    exit_depths,
    mixed_bytes,
    step_bytes,
    tokens_of_cycle,
)
from bench.lib.peers import fill_cache
from bench.lib.weights import random_network
from river_ext import ops
from river_ext.engine.generate import Engines, generate
from river_ext.engine.graph import Memory, Runner, whole_steps
from river_ext.engine.lossless import CycleRunner, cycle, draft_step, verification
from river_ext.engine.network import Network
from river_ext.engine.request import request
from river_ext.engine.step import Row

CONTEXT = 1024  # of the budgets, at batch 1
STEPS = 2  # of one replay: device control captures two together, unless the variant paired_steps is off
MARGIN = 128  # positions of the cache past the context; every step takes one
TOKENS = (33, 97)  # generate's new tokens, short and long: the difference is decoding alone
EARLY = 4  # the exit depth of every other row, where rows take both paths
CYCLES = {1: (1, 2, 3, 4, 7), 2: (3,)}  # drafts of the lossless cycles, by requests
ACCEPTANCES = (0.8, 0.93)  # of drafts, that are assumed


class Replays:
    """A graph that is replayed `count` times for once."""

    def __init__(self, graph: torch.cuda.CUDAGraph, count: int):
        self.graph, self.count = graph, count

    def replay(self) -> None:
        for _ in range(self.count):
            self.graph.replay()


class Step:
    """The state of decoding steps at one context and batch, and the graph of STEPS of them, of one design."""

    def __init__(self, network: Network, rows: int, context: int, design: str = variants.DEFAULT):
        self.network, self.context, self.rows = network, context, rows
        with variants.using(design):
            memory = Memory(network, rows, context + MARGIN)
            self.runner = Runner(memory, rows, stop_tokens=16, together=False)
        fill_cache(memory.cache)
        self.tokens = torch.randint(0, network.config.vocab_size, (rows,), device=network.device)
        self.layers = network.config.num_hidden_layers
        self.set_depths([self.layers] * rows)
        with variants.using(design):
            count = STEPS if ops._C.variants()["paired_steps"] else 1
            run = torch.inference_mode()(lambda: whole_steps(self.runner, count, filters=False))
            self.graph = Replays(gpu.capture(run), STEPS // count)

    def set_depths(self, depths: list[int]) -> None:
        """By the rule itself, as a caller would; one depth per row."""
        decision = self.runner.decision
        decision.limit.copy_(torch.tensor([self.layers if depth else 0 for depth in depths]))
        own = torch.tensor([-2.0 if depth < self.layers else math.inf for depth in depths])
        self.runner.thresholds.copy_(own)  # the same for each layer
        decision.min_layers.copy_(torch.tensor([max(depth, 1) for depth in depths]))
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
        runner.drawing.temperature.zero_()
        for state in (runner.decision.exited, runner.steps_taken):
            state.zero_()

    def check(self, depths: list[int]) -> None:
        """What the last replay did must be what was asked."""
        taken = int(self.runner.steps_taken.item())
        record = self.runner.records[(taken - 1) % len(self.runner.records)]
        step, *found = record[: 1 + self.rows].tolist()
        if step != taken or found != depths:
            raise SystemExit(f"steps: the device took step {step} at depths {found}, not {taken} at {depths}")

    @torch.inference_mode()
    def kernels_time(self, depth: int, repeats: int) -> Time:
        network, runner, eps = self.network, self.runner, self.network.config.rms_norm_eps

        def run() -> None:
            hidden = runner.hidden
            for index, layer in enumerate(network.layers):
                hidden, _ = (layer.block if index < depth else layer.exit)(hidden, runner.place)
            ops.lm_head(hidden, network.norm, network.lm_head, eps, return_logits=False)

        self.reset()
        return gpu.time_graph(gpu.capture(run), 1, repeats)


class Cycle:
    """The state of lossless cycles of some requests at one context, and the graph of one cycle."""

    def __init__(self, network: Network, requests: int, context: int, drafts: int, repeats: int):
        self.drafts, self.repeats = drafts, repeats  # cycles from one reset to the next
        config, most = network.config, repeats * (drafts + 1) + 1  # more tokens than those cycles draw
        memory = Memory(network, requests, context + most)
        fill_cache(memory.cache)
        self.runner = CycleRunner(memory, requests, stop_tokens=16)
        asked = request(config, None, [0], {"mode": "lossless", "stop_tokens": (), "max_new_tokens": most})
        tokens = torch.randint(0, config.vocab_size, (requests,)).tolist()
        self.rows = [Row(token, context, slot, asked, remaining=most) for slot, token in enumerate(tokens)]
        self.reset()
        self.graph = gpu.capture(torch.inference_mode()(lambda: cycle(self.runner, drafts, filters=False)))

    def reset(self) -> None:
        self.runner.start(self.rows)
        self.runner.want([self.drafts] * len(self.rows))
        self.runner.memory.lead_caller()  # whose stream the replays are on

    def replay(self) -> None:
        """A cycle under the host's control, in the place of the graph's."""
        self.runner.memory.follow_caller()
        for index in range(self.drafts):
            self.runner.replay(draft_step, index, False)
            self.runner.drafted(index)
        self.runner.replay(verification, self.drafts, False)
        self.runner.memory.lead_caller()

    def check(self) -> None:
        """The last cycle must have verified every draft, and no request may have ended before it."""
        done = int(self.runner.cycles_done.item())
        counts, _, similarities = self.runner.record(done, self.drafts)
        # an inactive row keeps its hidden state, so that every layer finds the same similarity
        idle = sum(len(set(by_layer)) == 1 for by_layer in similarities)
        if done != self.repeats or min(counts) < 1 or idle:
            raise SystemExit(
                f"steps: {done} of {self.repeats} cycles; the last gave {counts} tokens, {idle} rows inactive"
            )


def device_times(steps: dict[str, Step], depths: list[int], repeats: int) -> dict[str, Time]:
    """Of every design, in turns."""
    for step in steps.values():
        step.set_depths(depths)
    times = gpu.time_together(
        {design: (step.graph, STEPS, step.reset) for design, step in steps.items()}, repeats
    )
    for step in steps.values():
        step.check(depths)
    return times


def options_at(depth: int, layers: int) -> dict:
    if depth == 0:
        return {"mode": "full_w4"}
    if depth == layers:
        return {"mode": "full"}
    return {"threshold": -2.0, "min_layers": depth}


def generate_us(network: Network, depth: int, context: int, control: str, repeats: int) -> float:
    """Wall clock of a token at about this context, batch 1: long runs less short ones."""
    prompt = torch.randint(0, network.config.vocab_size, (context - TOKENS[0],)).tolist()
    options = {"stop_tokens": (), **options_at(depth, network.config.num_hidden_layers)}
    engines = Engines(network, text=None)  # one engine takes all calls

    def seconds(count: int) -> float:
        own = options | {"max_new_tokens": count}
        output = generate(engines, prompt, own, batch_policy="row", exit_control=control)
        depths = set(output.exit_depths[1:])
        if depths != {depth}:
            raise SystemExit(f"steps: {control} control exited at {sorted(depths)}, not at {depth}")
        return output.stats.decode_seconds

    short, long = TOKENS
    seconds(long)  # captures
    differences = [seconds(long) - seconds(short) for _ in range(repeats)]
    return 1e6 * statistics.median(differences) / (long - short)


def measure(
    results: gpu.Results, ceiling: float, model: str, network: Network, rows: int, context: int,
    depths: list[int], repeats: int,
) -> None:  # fmt: skip
    step = Step(network, rows, context)
    for depth in depths:
        kernels = step.kernels_time(depth, repeats)
        device = device_times({variants.DEFAULT: step}, [depth] * rows, repeats)[variants.DEFAULT]
        line = step_fields(model, depth, context, rows, ceiling, device)
        line |= {
            "variant": variants.DEFAULT,
            "kernels": kernels.fields(),
            "control_us": device.us - kernels.us,
        }
        results(
            "step", f"{text_of(line)}, kernels {kernels.us:.0f} us, control {line['control_us']:.1f}", **line
        )


def compare(
    results: gpu.Results, ceiling: float, model: str, network: Network, design: str, depths: list[int],
    repeats: int,
) -> None:  # fmt: skip
    """A design in turns with the default, on the steps of the budgets."""
    steps = {name: Step(network, 1, CONTEXT, name) for name in (variants.DEFAULT, design)}
    for depth in depths:
        times = device_times(steps, [depth], repeats)
        line = step_fields(model, depth, CONTEXT, 1, ceiling, times[design])
        line |= {"variant": design, "beside_us": times[variants.DEFAULT].us}
        results("step", f"{text_of(line)}, default {line['beside_us']:.0f} us", **line)


def measure_mixed(results: gpu.Results, ceiling: float, model: str, network: Network, repeats: int) -> None:
    """Eight rows of which four leave early, each on its own, beside eight on the same path."""
    config, rows = CONFIGS[model], ops.MAX_ROWS
    step, layers = Step(network, rows, CONTEXT), config.num_hidden_layers
    times = {
        name: device_times({"": step}, depths * (rows // len(depths)), repeats)[""]
        for name, depths in (("mixed", [EARLY, layers]), ("dense", [layers]), ("packed", [0]))
    }
    mixed, dense, packed = times.values()
    size = mixed_bytes(config, EARLY, CONTEXT, rows)
    floor = size / ceiling / 1e3
    line = {
        "model": model, "depth": EARLY, "rows": rows, "context": CONTEXT, "bytes": size, "floor_us": floor,
        "x_floor": mixed.us / floor, **{name: time.fields() for name, time in times.items()},
    }  # fmt: skip
    text = (
        f"{model} T={rows}, every other row leaves at depth {EARLY}: {mixed.us:.0f} us, "
        f"{line['x_floor']:.3f} x floor; all dense {dense.us:.0f} us, all packed {packed.us:.0f} us"
    )
    results("mixed", text, **line)


def measure_cycles(results: gpu.Results, ceiling: float, model: str, network: Network, repeats: int) -> None:
    """In turns with full bf16 steps of as many rows as there are requests."""
    for requests, choices in CYCLES.items():
        full = Step(network, requests, CONTEXT)
        cycles = {drafts: Cycle(network, requests, CONTEXT, drafts, repeats) for drafts in choices}
        graphs = {drafts: (one.graph, 1, one.reset) for drafts, one in cycles.items()}
        graphs |= {f"{drafts} by the host": (one, 1, one.reset) for drafts, one in cycles.items()}
        times = gpu.time_together(graphs | {"full": (full.graph, STEPS, full.reset)}, repeats)
        full.check([full.layers] * requests)
        for drafts, one in cycles.items():
            one.check()
            both = times[drafts], times[f"{drafts} by the host"]
            line = cycle_fields(model, drafts, requests, ceiling, *both, times["full"])
            results("cycle", cycle_text(line), **line)


def cycle_fields(
    model: str, drafts: int, requests: int, ceiling: float, time: Time, by_host: Time, full: Time
) -> dict:
    size = cycle_bytes(CONFIGS[model], drafts, CONTEXT, requests)
    floor, asked = size / ceiling / 1e3, CYCLE_BUDGET
    budget = asked if (asked.model, asked.drafts, 1) == (model, drafts, requests) else None
    return {
        "model": model, "drafts": drafts, "requests": requests, "context": CONTEXT, "bytes": size,
        "ceiling_gb_s": ceiling, "floor_us": floor, "cycle": time.fields(), "by_host": by_host.fields(),
        "full": full.fields(), "x_floor": time.us / floor, "goal": budget and budget.goal,
        # by the acceptance that is assumed, as the name of a field
        "x_full": {str(a): tokens_of_cycle(drafts, a) * full.us / time.us for a in ACCEPTANCES},
        "goal_x_full": budget and {str(budget.acceptance): budget.speed_up},
    }  # fmt: skip


def cycle_text(line: dict) -> str:
    gains = ", ".join(f"{gain:.2f} at acceptance {at}" for at, gain in line["x_full"].items())
    return (
        f"{line['model']} cycle of {line['drafts']} drafts, {line['requests']} requests: "
        f"{line['cycle']['us']:.0f} us (spread {line['cycle']['spread_percent']:.1f} %), "
        f"{line['x_floor']:.3f} x floor; by the host {line['by_host']['us']:.0f} us; "
        f"full step {line['full']['us']:.0f} us, x full: {gains}"
    )


def step_fields(model: str, depth: int, context: int, rows: int, ceiling: float, device: Time) -> dict:
    config = CONFIGS[model]
    size = step_bytes(config, depth, context, rows)
    floor = size / ceiling / 1e3
    asked = [b for b in BUDGETS if (b.model, b.depth, CONTEXT, 1) == (model, depth, context, rows)]
    goal, best_public = (asked[0].goal, asked[0].best_public) if asked else (None, None)
    return {
        "model": model, "depth": depth, "layers": config.num_hidden_layers, "context": context, "rows": rows,
        "bytes": size, "ceiling_gb_s": ceiling, "floor_us": floor, "device": device.fields(),
        "x_floor": device.us / floor, "gb_s": size / device.us / 1e3, "goal": goal,
        "best_public": best_public, "tokens_per_second": rows * 1e6 / device.us,
    }  # fmt: skip


def text_of(line: dict) -> str:
    return (
        f"{line['model']} depth {line['depth']:>2} context {line['context']:>4} T={line['rows']} "
        f"{line['variant']}: {line['device']['us']:.0f} us, {line['gb_s']:.0f} GB/s, "
        f"(spread {line['device']['spread_percent']:.1f} %), {line['x_floor']:.3f} x floor"
    )


def rest(args, asked: dict[str, list[Budget]]) -> list[tuple[str, int, int, list[int]]]:
    """(model, context, rows, depths) of what no budget asks."""
    cases = []
    for context in args.contexts:
        for rows in args.rows:
            for model in args.models:
                depths = args.depths or exit_depths(CONFIGS[model])
                if (rows, context) == (1, CONTEXT):
                    depths = [depth for depth in depths if depth not in [b.depth for b in asked[model]]]
                cases.append((model, context, rows, depths))
    return cases


def attempt(results: gpu.Results, model: str, what: str, measure: Callable[[], None]) -> None:
    """What fails is recorded as not run: the numbers that follow are worth more."""
    try:
        measure()
    except (Exception, SystemExit) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        results("not run", f"{model} {what}: {reason}", model=model, what=what, reason=reason)


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    p.add_argument("--contexts", type=int, nargs="+", default=[32, 1024, 8192])
    p.add_argument("--rows", type=int, nargs="+", choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    p.add_argument("--depths", type=int, nargs="+", help="exit depths (default: all of the table)")
    p.add_argument("--no-generate", action="store_true", help="leave out the wall clock of generate")
    p.add_argument("--repeats", type=int, default=10)
    variants.add_argument(p, whole_steps=True)
    args = p.parse_args()
    if args.repeats > MARGIN // STEPS:
        p.error(f"--repeats {args.repeats}; accepted: up to {MARGIN // STEPS}")
    if args.quick:
        args.models, args.contexts, args.rows, args.no_generate = ["1B"], [CONTEXT], [1], True
    gpu.require_cuda()
    results = gpu.Results("steps", args)
    ceiling, networks = ring.ceiling(results), {}
    asked = {
        model: [b for b in BUDGETS if b.model == model and b.depth in (args.depths or [b.depth])]
        for model in args.models
    }
    for model in args.models:
        networks[model] = random_network(CONFIGS[model])
        depths = [budget.depth for budget in asked[model]]
        measure(results, ceiling, model, networks[model], 1, CONTEXT, depths, args.repeats)
        common = results, ceiling, model, networks[model]
        attempt(results, model, "lossless cycles", partial(measure_cycles, *common, args.repeats))
        attempt(results, model, "rows on both paths", partial(measure_mixed, *common, args.repeats))
        for design in variants.designs(args)[1:]:
            attempt(results, model, design, partial(compare, *common, design, depths, args.repeats))
    for model, network in networks.items():
        for budget in () if args.no_generate else asked[model]:
            for control in ("host", "device"):
                us = generate_us(network, budget.depth, CONTEXT, control, repeats=3)
                text = f"{model} depth {budget.depth:>2}: generate, {control} control: {us:.0f} us a token"
                results("generate", text, model=model, depth=budget.depth, control=control, us=us)
    for model, context, rows, depths in () if args.quick else rest(args, asked):
        measure(results, ceiling, model, networks[model], rows, context, depths, args.repeats)
    for model, network in networks.items():
        results("clocks", model=model, **clocks.under_load(Step(network, 1, 32).graph))
    for tables in (variant_lines, step_lines, cycle_lines):
        print("\n".join(tables(results.lines)))


if __name__ == "__main__":
    main()
