"""generate, stream and score with hostile arguments: one error, or what the same call gives again."""

import array
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .mutate import HOSTILE
from .samples import byte_tokenizer, random_text, write_checkpoint

OPTIONS = {
    "max_new_tokens": [1, 2, 5], "threshold": [0.5, float("inf"), -2, 0.9], "min_layers": [1, 2],
    "batch_policy": ["min", "row"], "prefill": ["full", "depth:1", "min", "last", "depth:0", "depth:" + "9"
    * 5000], "mode": ["river", "full", "full_w4", "lossless"], "kv_strategy": ["share", "mask", "recompute",
    "propagate", "monotone"],
    "temperature": [0.0, 0.8, 1e-30, 1e38, 1e39], "top_k": [0, 1, 5, 10**9], "top_p": [1.0, 0.5, 1e-9,
    1e-46], "min_p": [0.0, 0.1, 1, 1e-46, 1.1], "seed": [0, 1, -1, 2**63 - 1, 2**63],
    "stop": ["a", ["b", "c"], "<|im_end|>", ["a" * 10**5], ["x"] * 3000],
    "stop_tokens": [[], [5], 5, {3, 4}, None, [2**40]], "return_logits": [True, False],
    "exit_control": ["auto", "host", "device"], "river_head": ["model", "w4"],
    "deep_tokens": ["stream", "exit"], "no_such_option": [1],
}  # fmt: skip


class State:
    def __init__(self, folder: Path):
        import river_ext

        directory = write_checkpoint(folder / "model", byte_tokenizer())
        (directory / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role + m.content | string }}{% endfor %}"
        )
        self.model = river_ext.load(directory, device="cpu")


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    import numpy
    import torch

    from river_ext import RiverError

    options = {"max_new_tokens": 3}
    for name in random.sample(list(OPTIONS), random.choice((0, 1, 2, 3))):
        options[name] = random.choice(HOSTILE if random.random() < 0.3 else OPTIONS[name])
    ids = [random.randrange(256) for _ in range(random.choice((1, 3, 20)))]
    prompt = random.choice([
        ids, tuple(ids), random_text(random), [ids, ids[:1]], [random_text(random), ids], torch.tensor(ids),
        torch.tensor([ids]), numpy.array(ids), array.array("i", ids), set(ids), range(5), [ids] * 9,
        iter(ids), b"bytes", random.choice(HOSTILE), [random.choice(HOSTILE)], ids +
        [random.choice(HOSTILE)], {"input_ids": ids}, [{"role": "user", "content": random_text(random)}],
        [{"role": "user", "content": random.choice(HOSTILE)}], [{random.choice(HOSTILE[:4]): "a"}],
    ])  # fmt: skip
    call = random.choice((state.model.generate, lambda *a, **o: list(state.model.stream(*a, **o))))
    try:
        first = call(prompt, **options)
    except RiverError as error:
        expect_one_line(error)
        return REFUSED
    except TypeError as error:
        expect("no_such_option" in str(error), f"TypeError: {error}")
        return REFUSED
    if not hasattr(prompt, "__next__"):
        again = call(prompt, **options)
        expect(tokens_of(first) == tokens_of(again), f"{options}: another time other tokens")
    expect(
        all(0 <= token < state.model.config.vocab_size for token in tokens_of(first)), f"{tokens_of(first)}"
    )
    return ACCEPTED


def tokens_of(result) -> list[int]:
    """Of an output, of outputs, or of the pieces of a stream."""
    if hasattr(result, "tokens"):
        return result.tokens
    return [token for item in result for token in (item.tokens if hasattr(item, "tokens") else [item.token])]
