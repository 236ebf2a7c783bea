"""Who takes the steps of a run: three decoders with the same tokens, exit depths and similarities.

    EagerDecoder    decode_step, op by op
    HostDecoder     part of the backbone, read similarities, decide, ..., the tail of that exit depth
    DeviceDecoder   whole steps whose layers choose their own path, while the host runs behind

The last two replay what graph.py captures.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .cache import KVCache
from .graph import Depths, advance, backbone_part, lend_runner, river_part, tail_part, whole_steps
from .network import Network
from .request import Plan
from .sampling import draw
from .step import Rows, StepOutput, decode_step

# Steps in flight beyond the one that the host waits for: with the second of a pair, fewer than graph.RECORDS
RUN_AHEAD = 4


class Decoder(Protocol):
    """Takes the steps of one run, from the end of its prefill on."""

    cache: KVCache  # what the prefill fills

    def start(self, rows: Rows) -> None:
        """The first tokens to go in."""

    def step(self) -> StepOutput:
        """One more token for every row; each token goes in at the next step."""

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the rows of the last step's output."""

    def close(self) -> None:
        """Ends the run, wherever it is."""


def decoder_for(network: Network, plan: Plan, max_len: int) -> Decoder:
    """The one that the plan asks for; its cache has a slot for each prompt and at least max_len positions.

    On a GPU "auto" is the device where that is possible: predicted to be the faster, not yet measured.
    """
    control = plan.exit_control
    if control == "auto" and network.device.type == "cpu":
        return EagerDecoder(network, plan, max_len)
    if control == "auto":
        control = "host" if plan.return_logits else "device"
    return {"host": HostDecoder, "device": DeviceDecoder}[control](network, plan, max_len)


class EagerDecoder:
    """A Decoder that calls `decode_step`."""

    def __init__(self, network: Network, plan: Plan, max_len: int):
        self.network, self.plan = network, plan
        self.cache = KVCache(network.config, len(plan.prompts), max_len, network.dtype, network.device)

    def start(self, rows: Rows) -> None:
        self.rows = rows

    def step(self) -> StepOutput:
        plan = self.plan
        output = decode_step(self.network, self.cache, self.rows, plan.sampling, plan.return_logits)
        self.rows = self.rows.advance(output.tokens)
        return output

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = self.rows.keep(rows)

    def close(self) -> None:
        pass


class _GraphDecoder:
    """A Decoder on a runner that is its own until it closes, so that streams of one model may take turns."""

    def __init__(self, network: Network, plan: Plan, max_len: int):
        self.network, self.plan = network, plan
        self.runner = lend_runner(network, len(plan.prompts), max_len, len(plan.stop_tokens))
        self.cache = self.runner.cache

    def start(self, rows: Rows) -> None:
        self.rule = rows.rule
        self.live = list(range(len(rows.slots)))  # rows of the runner, in the order of the outputs
        self.taken = 0  # steps whose output the caller has
        self.runner.start(self.network, rows, self.plan)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """The device has dropped the others by itself, unless they ended by a stop string."""
        kept = [self.live[row] for row in rows]
        with torch.cuda.stream(self.runner.stream):
            for row in set(self.live) - set(kept):
                self.runner.slots[row] = -1
        self.live, self.rule = kept, self.rule.keep(rows)

    def close(self) -> None:
        """Gives the runner back, once nothing of it is in flight."""
        self.runner.synchronise()
        self.network.idle_runners.append(self.runner)
        del self.runner, self.cache

    def _output(
        self,
        tokens: list[int],
        depths: list[int],
        similarities: list[list[float]],
        logits: Tensor | None = None,
    ) -> StepOutput:
        """Of the live rows; what goes in is by row of the runner, similarities by layer and row."""
        by_row = [[similarities[index][row] for index in range(depths[row])] for row in self.live]
        tokens = torch.tensor([tokens[row] for row in self.live])
        logits = None if logits is None else logits[self.live]
        return StepOutput(tokens, logits, [depths[row] for row in self.live], by_row)


class HostDecoder(_GraphDecoder):
    """Replays the backbone up to the next depth at which the rule may be met, and decides there."""

    @torch.inference_mode()
    def step(self) -> StepOutput:
        runner, logits = self.runner, None
        with torch.cuda.stream(runner.stream):
            depths = self._run_backbone()
            if not self.plan.return_logits:
                runner.replay(self.network, tail_part, depths, self.plan.sampling.filters)
        if self.plan.return_logits:
            drawn, logits = self._run_tail_with_logits(depths)  # drawn must live until the record is there
        self.taken += 1
        _, tokens, _ = runner.record(self.taken)
        depth = depths[-1] if depths else 0
        return self._output(tokens, [depth] * runner.rows, runner.seen.tolist(), logits)

    def _run_backbone(self) -> Depths:
        runner, rule, depths = self.runner, self.rule, ()
        runner.seen.fill_(math.nan)  # which no similarity is
        for depth in range(1, rule.limit + 1):
            if depth < rule.limit and not rule.can_exit(depth):
                continue
            depths += (depth,)
            runner.replay(self.network, backbone_part, depths)
            if depth < rule.limit and any(rule.exits(depth, self._similarities(depth))):
                break
        return depths

    def _similarities(self, depth: int) -> list[float]:
        """Of the live rows at the last of `depth` layers, as soon as they are there."""

        def read() -> list[float]:
            similarities = self.runner.seen[depth - 1].tolist()
            return [similarities[row] for row in self.live]

        return self.runner.poll(read, lambda similarities: not any(map(math.isnan, similarities)))

    def _run_tail_with_logits(self, depths: Depths) -> tuple[Tensor, Tensor]:
        """Tokens and logits by row of the runner, on the caller's stream, which runs the head."""
        runner, network = self.runner, self.network
        before, hidden = runner.state(depths)
        if not depths or depths[-1] < runner.layers:  # else there is nothing to capture
            with torch.cuda.stream(runner.stream):
                before, hidden = runner.replay(network, river_part, depths).outputs
        runner.lead_caller()
        filters = self.plan.sampling.filters
        drawn, logits = draw(network, hidden, runner.drawing, filters, return_logits=True)
        runner.follow_caller()
        with torch.cuda.stream(runner.stream):
            advance(network, runner, before, hidden, drawn)
        return drawn, logits


class DeviceDecoder(_GraphDecoder):
    """Replays whole steps, some of them before the host has seen what the earlier ones gave."""

    def start(self, rows: Rows) -> None:
        super().start(rows)
        self.replayed = 0  # steps
        self.pairs = bool(ops._C.variants()["paired_steps"])  # two steps in one graph

    @torch.inference_mode()
    def step(self) -> StepOutput:
        # only the host knows stop strings: with several rows, it may have to drop one before the others go on
        ahead = 0 if self.plan.stop and len(self.live) > 1 else RUN_AHEAD
        last = self.plan.max_new_tokens - 1
        with torch.cuda.stream(self.runner.stream):
            while self.replayed < min(self.taken + 1 + ahead, last):
                count = 2 if self.pairs and ahead and last - self.replayed >= 2 else 1
                self.runner.replay(self.network, whole_steps, count, self.plan.sampling.filters)
                self.replayed += count
        self.taken += 1
        depths, tokens, similarities = self.runner.record(self.taken)
        return self._output(tokens, depths, similarities)
