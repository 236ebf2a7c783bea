"""Numbers in the sentences of the documents, from the results: VALUES, by the names of their places."""

from collections.abc import Callable, Iterable

from bench.lib.results import result, the_line
from river_ext.thresholds.guarantee import upper_bound


def between(values: Iterable[float], form: str) -> str:
    """The least and the largest, as a range; one number where they read alike."""
    values = list(values)
    ends = [f"{end:{form}}" for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


# --- decoding ----------------------------------------------------------------------------------------------


def decode(key: str, form: str) -> str:
    return between(
        (line[key] for line in result("decode")["decode"] if "transformers" not in line["run"]), form
    )


def linear(key: str, form: str, weights: str, *rows: int, shape: str = "") -> str:
    """Of weights "dense" or "w4", for so many rows."""
    return between(
        (
            line[key]
            for line in result("linear")["linear"]
            if line["format"] == weights and line["rows"] in rows and line["shape"].startswith(shape)
        ),
        form,
    )


def cycle(drafts: int, key: str, form: str) -> str:
    return f"{the_line(result('cycle')['cycle'], drafts=drafts)[key]:{form}}"


def cycle_over_bytes(drafts: int) -> str:
    line = the_line(result("cycle")["cycle"], drafts=drafts)
    return f"{line['time'] / line['bytes']:.2f}"


def llama_cpp(bf16_decoding: bool, form: str, inverse: bool = False) -> str:
    """Our speed over llama.cpp's, or the other way round: of decoding with bf16 weights, or of all else."""
    lines = [line for line in result("peers")["peers"] if line["runner"] == "llama.cpp"]
    chosen = (
        line for line in lines if bf16_decoding == ((line["what"], line["bits"]) == ("decoding", "bf16"))
    )
    return between((1 / line["x"] if inverse else line["x"] for line in chosen), form)


def weights_per_second(runner: str) -> str:
    """GB/s of the bf16 weights of the 1B model, beside the peers."""
    full = the_line(result("decode")["decode"], run="full bf16")
    line = the_line(result("peers")["peers"], runner=runner, shape="1B", what="decoding", bits="bf16")
    return f"{line['tokens_per_second'] * full['bytes'] / 1e9:.0f}"


def lossless_settings(file: str, results: str = "lossless") -> list[dict]:
    """For the file with prompts whose name begins so."""
    (text,) = (text for text in result(results)["texts"] if text["file"].startswith(file))
    return text["settings"]


def lossless_speed(file: str) -> str:
    return f"{the_line(lossless_settings(file), setting='lossless auto')['x_full_bf16']:.2f}"


# --- thresholds --------------------------------------------------------------------------------------------


def similarity(first: int, last: int) -> str:
    """Medians after these layers, counted from 1."""
    return between(result("thresholds")["similarity"]["50"][first - 1 : last], ".2f")


def threshold_line(part: str, setting: str, key: str) -> float:
    return the_line(result("thresholds")[part], setting=setting)[key]


def kv_settings(model: str) -> list[dict]:
    return the_line(result("kv-strategies")["models"], model=model)["settings"]


def kv_line(setting: str) -> dict:
    """Of the bundled model."""
    return the_line(kv_settings("bundled"), setting=setting)


def demo_rows() -> dict[str, dict]:
    """Of `river eval --demo`, by name."""
    return {row["name"]: row for row in result("eval-demo")["rows"]}


def demo_speed() -> str:
    """Of the river over full depth."""
    shared = [line for line in kv_settings("bundled") if line["setting"].startswith("share")]
    return between((line["x_full_bf16"] for line in shared), ".2f")


def demo_depth(setting: str) -> str:
    return f"{demo_rows()[setting]['mean_exit_depth']:.1f}"


def demo_point() -> dict:
    """Of the threshold 0.98 on the bundled model."""
    return the_line(result("calibrate-demo")["curve"], threshold=0.98)


def demo_bound() -> str:
    point, confidence = demo_point(), result("calibrate-demo")["targets"]["confidence"]
    return f"{100 * upper_bound(point['different'], point['answers'], confidence):.1f} %"


def by_layer(key: str) -> float:
    """Of the thresholds by layer that are nearest to the single threshold of 0.98 in different tokens."""
    points = [point for point in result("calibrate-135M")["curve"] if isinstance(point["threshold"], list)]
    nearest = min(points, key=lambda point: abs(point["disagreement"] - single("disagreement")))
    return nearest[key]


def single(key: str) -> float:
    return the_line(result("calibrate-135M")["curve"], threshold=0.98)[key]


VALUES: dict[str, Callable[[], str]] = {
    "plain-read": lambda: decode("read_gb_s", ".1f"),
    "share-of-plain-read": lambda: decode("percent_of_read", ".0f"),
    "linear-dense-gb": lambda: linear("gb_s", ".0f", "dense", 1),
    "linear-dense-x-torch": lambda: linear("x_torch_dense", ".1f", "dense", 1),
    "linear-dense-share": lambda: linear("percent_of_read", ".0f", "dense", 1),
    "linear-w4-gb": lambda: linear("gb_s", ".0f", "w4", 1),
    "linear-w4-x-torch": lambda: linear("x_torch_int4", ".1f", "w4", 1),
    "linear-w4-share": lambda: linear("percent_of_read", ".0f", "w4", 1),
    "linear-dense-captured": lambda: linear("captured_percent_of_read", ".0f", "dense", 1),
    "linear-w4-captured": lambda: linear("captured_percent_of_read", ".0f", "w4", 1),
    "linear-w4-captured-4": lambda: linear("captured_percent_of_read", ".0f", "w4", 4, shape="1B"),
    "linear-w4-captured-8": lambda: linear("captured_percent_of_read", ".0f", "w4", 8, shape="1B"),
    "cycle-step-ms": lambda: cycle(0, "ms", ".1f"),
    "cycle-4-over-bytes": lambda: cycle_over_bytes(4),
    "llama-cpp-bf16-decoding": lambda: llama_cpp(True, ".2f"),
    "llama-cpp-bf16-ahead": lambda: llama_cpp(True, ".1f", inverse=True),
    "llama-cpp-all-else": lambda: llama_cpp(False, ".1f"),
    "llama-cpp-gb": lambda: weights_per_second("llama.cpp"),
    "river-gb": lambda: weights_per_second("river_ext"),
    "lossless-x": lambda: lossless_speed("test"),
    "lossless-x-code": lambda: lossless_speed("HumanEval"),
    "similarity-1": lambda: similarity(1, 1),
    "similarity-2": lambda: similarity(2, 2),
    "similarity-plateau": lambda: similarity(3, 24),
    "similarity-30": lambda: similarity(30, 30),
    "depth-0.96": lambda: f"{threshold_line('forced', 'River 0.96', 'exit_depth'):.0f}",
    "depth-0.98": lambda: f"{threshold_line('forced', 'River 0.98', 'exit_depth'):.0f}",
    "speed-0.98": lambda: f"{threshold_line('free', 'River 0.98', 'x_full_depth'):.1f}",
    "same-0.98": lambda: f"{100 * threshold_line('forced', 'River 0.98', 'same'):.0f} %",
    "recompute-rows": lambda: f"{kv_line('recompute 0.99')['backbone_rows']:.1f}",
    "recompute-depth": lambda: f"{kv_line('recompute 0.99')['mean_exit_depth']:.1f}",
    "demo-river-speed": demo_speed,
    "demo-depth-0.9": lambda: demo_depth("River 0.9"),
    "demo-depth-0.98": lambda: demo_depth("River 0.98"),
    "demo-depth-0.995": lambda: demo_depth("River 0.995"),
    "demo-answers": lambda: str(demo_point()["answers"]),
    "demo-bound": demo_bound,
    "by-layer-depth": lambda: f"{by_layer('exit_depth'):.1f}",
    "by-layer-bytes": lambda: f"{by_layer('by_bytes'):.2f}",
    "single-depth": lambda: f"{single('exit_depth'):.1f}",
    "single-bytes": lambda: f"{single('by_bytes'):.2f}",
    "by-layer-tokens": lambda: str(by_layer("tokens")),
}
