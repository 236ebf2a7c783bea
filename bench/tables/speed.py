"""Tables of decoding and of prompts in one process, beside peers: TABLES, by the names of their places."""

from bench.lib.models import LLAMA_1B
from bench.lib.prose import lossless_settings
from bench.lib.results import result
from bench.tables.layout import block, markdown, percent, threads

# the names of rows that are not those of the results
W4_HEAD = "full W4, the river's head"
NAMES = {"full W4, W4 head": W4_HEAD, "transformers eager": "transformers, eager"}
NAMES |= {f"exit depth {d}": f"exit depth {d} of {LLAMA_1B.num_hidden_layers}" for d in range(1, 16)}
LOSSLESS_NAMES = {
    "full bf16": "full bf16",
    "lossless auto": "lossless",
    "lossless 1": "1 draft",
    "river 0.9": "River 0.9",
    "full W4": W4_HEAD,  # bench/cpu/lossless.py draws its tokens by that one
} | {f"lossless {count}": f"{count} drafts" for count in (2, 3, 4)}


def decode_lines() -> list[dict]:
    """From most bytes to fewest, peers last."""
    lines = result("decode")["decode"]
    return sorted(lines, key=lambda line: (line["run"].startswith("transformers"), -line["bytes"]))


def decode_short() -> str:
    shown = ("full", "exit depth 4", "exit depth 1", "transformers")
    return block(
        ("", "ms per token", "GB/s", "x full bf16", "allowed"),
        [
            (
                NAMES.get(line["run"], line["run"]), f"{line['ms']:.1f}", f"{line['gb_s']:.1f}",
                f"{line['x_full_bf16']:.2f}", f"{line['allowed']:.2f}",
            )
            for line in decode_lines()
            if line["run"].startswith(shown)
        ],
    )  # fmt: skip


def decode() -> str:
    return markdown(
        ("", "ms per token", "tokens/s", "GB/s", "x full bf16", "allowed"),
        [
            (
                NAMES.get(line["run"], line["run"]), f"{line['ms']:.1f}", f"{line['tokens_per_second']:.1f}",
                f"{line['gb_s']:.1f}", f"{line['x_full_bf16']:.2f}", f"{line['allowed']:.2f}",
            )
            for line in decode_lines()
        ],
    )  # fmt: skip


CALIBRATED = ("lossless", "3 drafts", "4 drafts")  # whose lines with a calibrated river are shown


def lossless_lines(file: str) -> dict[str, dict]:
    """By name, for one of the files with prompts."""
    lines = {LOSSLESS_NAMES[line["setting"]]: line for line in lossless_settings(file)}
    for line in lossless_settings(file, "lossless-calibrated"):
        lines[f"{LOSSLESS_NAMES[line['setting']]}, calibrated"] = line
    return lines


def modes() -> str:
    lines, count = lossless_lines("test"), result("lossless")["count"]
    return block(
        ("", "tokens/s", "speed", "per pass", "same"),
        [
            (
                name, f"{line['tokens_per_second']:.0f}", f"{line['x_full_bf16']:.2f} x",
                f"{line['tokens_per_step']:.2f}", f"{round(line['same'] * count)} of {count}",
            )
            for name in ("full bf16", "lossless", "River 0.9", W4_HEAD)
            for line in [lines[name]]
        ],
    )  # fmt: skip


def lossless() -> str:
    problems, functions = lossless_lines("test"), lossless_lines("HumanEval")

    def cells(line: dict, with_drafting: bool) -> list[str]:
        if line["acceptance"] is None:
            return [f"{line['x_full_bf16']:.2f}"] + [""] * (3 if with_drafting else 2)
        drafting = [percent(line["drafting"])] if with_drafting else []
        right = percent(line["acceptance"])
        return [f"{line['x_full_bf16']:.2f}", f"{line['tokens_per_step']:.2f}", right, *drafting]

    names = ("lossless", "1 draft", "2 drafts", "3 drafts", "4 drafts")
    names += (*(f"{name}, calibrated" for name in CALIBRATED), "River 0.9", W4_HEAD)
    return markdown(
        ("", "GSM8K: x", "per pass", "right", "drafting", "HumanEval: x", "per pass", "right"),
        [
            (
                name.replace("lossless", "lossless, auto"),
                *cells(problems[name], True),
                *cells(functions[name], False),
            )
            for name in names
        ],
    )


def cycle() -> str:
    return markdown(
        ("drafts", "ms", "its bytes allow", "time", "x at 80 % right", "at 93 %"),
        [
            (
                str(line["drafts"]), f"{line['ms']:.1f}", f"{line['bytes']:.2f}", f"{line['time']:.2f}",
                f"{line['allows']['0.8']:.2f}", f"{line['allows']['0.93']:.2f}",
            )
            for line in result("cycle")["cycle"]
            if line["drafts"] in (1, 2, 3, 4, 7)
        ],
        names=0,
    )  # fmt: skip


def engine() -> str:
    lines: dict[str, dict[int, dict]] = {}
    for line in result("engine")["engine"]:
        mode = W4_HEAD if line["mode"] == "full W4" else line["mode"]  # bench/cpu/engine.py draws by that
        lines.setdefault(f"{line['shape']} shape, {mode}", {})[line["requests"]] = line
    return markdown(
        ("", "2 requests: x one", "of bytes", "4", "of bytes", "8", "of bytes", "tokens/s at 8"),
        [
            (
                name,
                *(
                    cell
                    for count in (2, 4, 8)
                    for cell in (f"{by[count]['x_one']:.2f}", percent(by[count]["of_bytes"]))
                ),
                f"{by[8]['tokens_per_second']:.0f}",
            )
            for name, by in sorted(lines.items(), key=lambda item: not item[0].startswith("1B"))
        ],
    )


def prefill() -> str:
    return markdown(
        ("", "tokens", "ms to the first token", "tokens/s", "x transformers", "of products"),
        [
            (
                f"{line['shape']} shape", f"{line['tokens']:,}", f"{line['ms']:,.0f}",
                f"{line['tokens_per_second']:,.0f}", f"{line['x_transformers']:.2f}",
                f"{line['percent_of_products']:.0f} %",
            )
            for line in result("prefill")["prefill"]
        ],
    )  # fmt: skip


def peers() -> str:
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for line in result("peers")["peers"]:
        rows.setdefault((line["shape"], f"{line['runner']}, {line['bits']}"), {})[line["what"]] = line

    def cells(runner: str, line: dict | None, form: str) -> tuple[str, str]:
        if line is None:
            return "", ""
        x = "" if runner.startswith("river_ext") else f"{line['x']:.2f}"
        return f"{line['tokens_per_second']:{form}}", x

    forms = {"prompt 128": ",.0f", "prompt 1024": ",.0f", "decoding": ".1f"}
    return markdown(
        ("", "", "prompt of 128", "x", "1,024", "x", "decoding", "x"),
        [
            (
                shape,
                runner,
                *(cell for what, form in forms.items() for cell in cells(runner, by.get(what), form)),
            )
            for (shape, runner), by in rows.items()
        ],
        names=2,
    )


def peers_text() -> str:
    found = result("peers-text")
    lengths, count = found["prompt_tokens"], found["count"]
    setting = (
        f"{found['model']} in bf16, {count} questions of GSM8K as {min(lengths)} to {max(lengths)} tokens "
        f"each, up to {found['new_tokens']} new ones, greedy, batch 1, "
        f"{threads(found['machine']['threads'])}, transformers {found['transformers']}:\n\n"
    )
    return setting + markdown(
        ("", "tokens/s", "x transformers, eager", "same", "new tokens"),
        [
            (
                line["runner"], f"{line['tokens_per_second']:.1f}", f"{line['x']:.2f}",
                "" if line["same"] is None else f"{line['same']} of {count}",
                str(line["new_tokens"] or ""),
            )
            for line in found["peers"]
        ],
    )  # fmt: skip


TABLES = {
    "modes": modes,
    "decode-short": decode_short,
    "decode": decode,
    "lossless": lossless,
    "cycle": cycle,
    "engine": engine,
    "prefill": prefill,
    "peers": peers,
    "peers-text": peers_text,
}
