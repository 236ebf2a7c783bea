"""What exit layers leave in the KV cache, beside what the backbone would have left there.

Full depth's text goes token by token through the same steps as in generation, behind a prompt at full depth,
once for each exit depth. From the caches come the cosines of K and of V with those of full depth:

- `kv`, after the paper's Fig. 5: percentiles over tokens and KV heads, by layer;
- `values`, after its Fig. 7: each token's similarity after the layer where it leaves, the cosine of its V in
  the last layer, all heads as one vector, and how the two correlate.
"""

from statistics import correlation

import torch
from torch import Tensor

from bench.cpu.thresholds import Text
from bench.lib.figures import BLUE, GREY, ORANGE
from river_ext.engine.decoder import HostDecoder
from river_ext.engine.graph import Memory
from river_ext.engine.prefill import Prefill
from river_ext.engine.request import request
from river_ext.engine.step import Row
from river_ext.model import Model

PERCENTILES = (5, 50)
MOST_POINTS = 300  # of the scatter plot that are kept


def measure(model: Model, texts: list[Text], depths: list[int], kv_depths: list[int]) -> dict:
    """`values` for each of the depths, `kv` for some of them."""
    full = [cache_of(model, text, {"mode": "full"}) for text in texts]
    similarities = [torch.tensor(text.similarities[1:], dtype=torch.float64) for text in texts]
    kv, values = [], []
    for depth in sorted({*depths, *kv_depths}):
        options = {"threshold": -2.0, "min_layers": depth}
        found = [cache_of(model, text, options) for text in texts]
        cosines = torch.cat([cosine(*pair) for pair in zip(found, full, strict=True)], dim=2)
        if depth in kv_depths:
            kv.append({"depth": depth} | {name: percentiles(cosines[i]) for i, name in enumerate("kv")})
        if depth in depths:
            similarity = torch.cat([rows[:, depth - 1] for rows in similarities])
            pairs = zip(found, full, strict=True)
            last = torch.cat([cosine(a[1, -1:].flatten(2), b[1, -1:].flatten(2))[0] for a, b in pairs])
            values.append(correlated(depth, similarity, last))
    return {"tokens": sum(len(rows) for rows in similarities), "kv": kv, "values": values}


@torch.inference_mode()
def cache_of(model: Model, text: Text, options: dict) -> Tensor:
    """K and V of the decoded tokens, fp64 [2, layers, tokens, kv_heads, head_dim]."""
    options = options | {"max_new_tokens": len(text.tokens), "stop_tokens": ()}
    asked = request(model.config, None, text.prompt, options)
    memory = Memory(model.network, slots=1, max_len=asked.positions)
    Prefill(memory.network, memory.cache, 0, asked).advance()
    decoder = HostDecoder(memory, together=False)
    first = len(text.prompt)
    for position, token in enumerate(text.tokens[:-1], start=first):
        decoder.start([Row(token, position, 0, asked, remaining=1)])
        decoder.step()
    layers = [memory.cache.layer(index) for index in range(model.config.num_hidden_layers)]
    both = [torch.stack([part[0] for part in parts]) for parts in zip(*layers, strict=True)]
    decoded = slice(first, first + len(text.tokens) - 1)
    return torch.stack(both)[:, :, :, decoded].transpose(2, 3).double()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def percentiles(cosines: Tensor) -> dict[str, list[float]]:
    """By layer, of [layers, tokens, kv_heads]."""
    at = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    found = cosines.flatten(1).quantile(at, dim=1)
    return {str(p): [round(v, 4) for v in row.tolist()] for p, row in zip(PERCENTILES, found, strict=True)}


def correlated(depth: int, similarity: Tensor, last: Tensor) -> dict:
    points = list(zip(similarity.tolist(), last.tolist(), strict=True))
    return {
        "depth": depth,
        "r": correlation(*zip(*points, strict=True)),
        "points": [[round(value, 4) for value in point] for point in points[:MOST_POINTS]],
    }


# --- drawing ------------------------------------------------------------------------------------------------


def draw_kv(axes, result: dict) -> None:
    """Layers that run in the backbone are left out: there the two are the same."""
    colors = (BLUE, ORANGE, GREY)
    for line, color in zip(result["kv"], colors, strict=False):
        depth = line["depth"]
        layers = range(depth + 1, result["layers"] + 1)
        for name, style in (("k", "--"), ("v", "-")):
            label = f"{name.upper()}, exit depth {depth}"
            axes.plot(layers, line[name]["50"][depth:], style, color=color, label=label)
            axes.fill_between(
                layers,
                line[name]["5"][depth:],
                line[name]["50"][depth:],
                color=color,
                alpha=0.12,
                linewidth=0,
            )
    axes.set(xlabel="layer", ylabel="cosine with the backbone's", ylim=(None, 1.0))
    axes.legend(frameon=False, ncols=2)


def draw_values(axes, result: dict) -> None:
    """For the shallowest of the depths that `draw_kv` has."""
    (line,) = (line for line in result["values"] if line["depth"] == result["kv"][0]["depth"])
    x, y = zip(*line["points"], strict=True)
    axes.plot(x, y, ".", color=BLUE, alpha=0.6)
    axes.set(
        xlabel=f"similarity after layer {line['depth']}, where the token leaves",
        ylabel="cosine of V in the last layer",
        title=f"r = {line['r']:.2f}",
    )


def draw_correlations(axes, result: dict) -> None:
    lines = result["values"]
    axes.plot([line["depth"] for line in lines], [line["r"] for line in lines], "o-", color=BLUE)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="exit depth", ylabel="r", title="by the layer where tokens leave", ylim=(-1, 1))
