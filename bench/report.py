"""The tables, numbers and figures of the documents, from the JSON in bench/results: none of it is typed.

A table stands in a document between lines with `<!--report:NAME-->` and `<!--end-->`, where NAME is one of
TABLES; a number in a sentence stands between the same, where NAME is one of VALUES.

    python -m bench.report            writes all of them anew, and the figures whose numbers have changed
    python -m bench.report --check    names what is not up to date, and then ends with 1; writes nothing
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from bench import memory
from bench.cpu import thresholds
from bench.figures import paper
from bench.lib import figures
from bench.lib.common import RESULTS
from bench.lib.models import LLAMA_1B
from bench.lib.prose import VALUES, demo_rows
from bench.lib.results import FILES, result
from river_ext.thresholds.guarantee import fewest_answers, upper_bound

ROOT = RESULTS.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!--report:(\S+?)-->)(.*?)(<!--end-->)", re.S)

# the names of rows that are not those of the results
W4_HEAD = "full W4, the river's head"
NAMES = {"full W4, W4 head": W4_HEAD, "transformers eager": "transformers, eager"}
NAMES |= {f"exit depth {d}": f"exit depth {d} of {LLAMA_1B.num_hidden_layers}" for d in range(1, 16)}
Rows = Iterable[Sequence[str]]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="write nothing")
    args = p.parse_args()
    stale = [path for path in DOCUMENTS if path.read_text() != rendered(path.read_text())]
    stale_figures = [path for path, (sources, _) in FIGURES.items() if not figures.is_of(path, sources)]
    for path in (*stale, *stale_figures):
        print(path.relative_to(ROOT))
    if args.check:
        sys.exit(bool(stale or stale_figures))
    for path in stale:
        path.write_text(rendered(path.read_text()))
    for path in stale_figures:
        sources, draw = FIGURES[path]
        draw(*sources, path)


def rendered(document: str) -> str:
    """The document with its tables and numbers as the results have them."""
    return PLACE.sub(lambda place: f"{place[1]}{shown(place[2])}{place[4]}", document)


def shown(name: str) -> str:
    """What stands at a place; what stands in the way ends the script with a line."""
    try:
        if name in TABLES:
            return f"\n{TABLES[name]()}\n"
        if name in VALUES:
            return VALUES[name]()
    except KeyError as error:
        sys.exit(f"report.py: {name!r} needs {error}, which its results do not have")
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {name!r}: {error}")
    sys.exit(f"report.py: {name!r}; accepted: {', '.join([*TABLES, *VALUES])}")


# --- how a table looks --------------------------------------------------------------------------------------


def block(head: Sequence[str], rows: Rows) -> str:
    """Columns of text in a fence: names to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in cells).rstrip()
        for cells in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    ]
    return fenced("\n".join(texts))


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def markdown(head: Sequence[str], rows: Rows, names: int = 1) -> str:
    """The first `names` columns to the left."""
    lines = [row(head), "|" + "---|" * names + "---:|" * (len(head) - names), *map(row, rows)]
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# --- decoding -----------------------------------------------------------------------------------------------


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


# --- modes of a trained model -------------------------------------------------------------------------------

LOSSLESS_NAMES = {
    "full bf16": "full bf16",
    "lossless auto": "lossless",
    "lossless 1": "1 draft",
    "river 0.9": "River 0.9",
    "full W4": W4_HEAD,  # bench/cpu/lossless.py draws its tokens by that one
} | {f"lossless {count}": f"{count} drafts" for count in (2, 3, 4)}


def lossless_lines(file: str) -> dict[str, dict]:
    """By name, for one of the files with prompts."""
    (text,) = (text for text in result("lossless")["texts"] if text["file"].startswith(file))
    return {LOSSLESS_NAMES[line["setting"]]: line for line in text["settings"]}


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

    names = ("lossless", "1 draft", "2 drafts", "3 drafts", "4 drafts", "River 0.9", W4_HEAD)
    return markdown(
        ("", "GSM8K: x", "per pass", "right", "drafting", "HumanEval: x", "per pass", "right"),
        [
            (
                "lossless, auto" if name == "lossless" else name,
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


def serve() -> str:
    """What HTTP leaves of the engine's speed."""
    lines = [
        (str(line["at_once"]), percent(line["share"]), ", ".join(map(percent, line["shares"])))
        for line in result("serve")["speed"]
    ]
    return markdown(("requests at once", "of the engine's tokens/s", "in each turn"), lines)


def pace() -> str:
    """Times to the first token."""
    found = result("serve")["pace"]
    long, (first, *later) = found["long_prompt_tokens"], found["turns_ms"]
    named = {
        f"a prompt of {long:,} tokens, alone": found["long_alone_ms"],
        "the same beside the next line's": found["long_beside_ms"],
        f"{found['short_prompt_tokens']} tokens that come meanwhile": found["short_ms"],
        "the first turn of a conversation": first,
        f"its later turns, up to {found['last_prompt_tokens']:,} tokens, the longest": max(later),
    }
    return markdown(("what", "first token after"), [(name, f"{ms:,.0f} ms") for name, ms in named.items()])


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


def threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


# --- thresholds ---------------------------------------------------------------------------------------------


def by_threshold() -> str:
    found = result("thresholds")
    speeds = {line["setting"]: f"{line['x_full_depth']:.2f} x" for line in found["free"]}
    return block(
        ("", "exit depth", "same", "KL, nats", "speed"),
        [
            (
                line["setting"], f"{line['exit_depth']:.2f}", f"{100 * line['same']:.1f} %",
                f"{line['kl']:.4f}", speeds.get(line["setting"], ""),
            )
            for line in found["forced"]
            if line.get("prefill", "full") == "full"
        ],
    )  # fmt: skip


def by_policy() -> str:
    policies = thresholds.by_policy(result("thresholds"))
    first, *others = policies
    same = {
        policy: {line["threshold"]: f"{100 * line['same']:.1f} %" for line in lines}
        for policy, lines in policies.items()
    }
    others.sort(key=lambda policy: -int(policy.partition(":")[2] or 0))  # from the deepest on
    return block(
        ("", f"prefill {first}", *others),
        [(f"River {t:g}", same[first][t], *(same[policy][t] for policy in others)) for t in same[others[0]]],
    )


# --- what `river calibrate` and `river eval` print ----------------------------------------------------------


def calibrated(name: str) -> str:
    """The curve. A speed over full depth by the clock says little on a busy machine, and is left out."""
    found = result(name)
    confidence = found["targets"]["confidence"]
    with_right = found["full_depth"]["right"] is not None

    def cells(point: dict) -> list[str]:
        answers, different = point["answers"], point["different"]
        single = isinstance(point["threshold"], float)
        right = [f"{point['right']} of {answers}"] if with_right else []
        return [
            f"{point['threshold']:g}" if single else "by layer", f"{point['exit_depth']:.2f}",
            f"{100 * (1 - point['disagreement']):.1f} %", f"{answers - different} of {answers}",
            f"{100 * (1 - upper_bound(different, answers, confidence)):.1f} %", *right,
            f"{point['by_bytes']:.2f} x",
        ]  # fmt: skip

    head = ["threshold", "exit depth", "same tokens", "same answers", f"{100 * confidence:g} % bound"]
    return block((*head, *(["right"] if with_right else []), "by bytes"), map(cells, found["curve"]))


def calibrated_rivers() -> str:
    """What `river convert --calibrate` prints."""
    models = {"SmolLM2-135M": "river-135M", "the bundled model": "river-demo"}
    found = {model: result(name)["calibration"] for model, name in models.items()}
    return markdown(
        ("", "tokens", "measured on", "agreement, HQQ", "calibrated", "KL, HQQ", "calibrated"),
        [
            (
                model, f"{line['tokens']:,}", f"{line['held_out_tokens']:,}",
                *(f"{100 * line[name]:.1f} %" for name in ("agreement_before", "agreement")),
                *(f"{line[name]:.3f}" for name in ("kl_before", "kl")),
            )
            for model, line in found.items()
        ],
    )  # fmt: skip


def promises() -> str:
    """How many prompts a promise takes at least."""
    shares = (0.2, 0.1, 0.05, 0.02, 0.01)
    return markdown(("promise", "prompts"), [(percent(s), str(fewest_answers(s, 0.95))) for s in shares])


def eval_demo() -> str:
    """Its quality. The speeds of a model of so few bytes are those of the calls, and of other programs."""
    return block(
        ("", "problems", "functions", "same output", "KL, nats", "exit depth"),
        [
            (
                name, *(with_error(row["accuracy"][kind]) for kind in ("problems", "functions")),
                f"{100 * row['equal_sequences']['value']:.1f} %", f"{row['kl']:.4f}",
                f"{row['mean_exit_depth']:.2f}",
            )
            for name, row in demo_rows().items()
        ],
    )  # fmt: skip


def with_error(share: dict) -> str:
    return f"{100 * share['value']:.1f} ± {100 * share['standard_error']:.1f} %"


# --- published tasks ----------------------------------------------------------------------------------------


def gsm8k() -> str:
    found = result("gsm8k")
    (task,) = found["tasks"]
    full = task["rows"][0]["tokens_per_second"]
    scores = ("strict-match", "flexible-extract")
    depth = f"mean exit depth of {found['num_hidden_layers']}"
    template = "the chat template" if task["chat"] else "no chat template"
    setting = (
        f"{found['model']}, the first {task['documents']} questions of GSM8K, {task['shots']}-shot, "
        f"{template}, max_gen_toks {task['max_gen_toks']}, greedy, batch {task['batch']}, "
        f"{threads(found['threads'])}:\n\n"
    )
    return setting + markdown(
        ("", *scores, "same output", depth, "new tokens", "tokens/s", "speed"),
        [
            (
                line["name"], *(score(line["accuracy"][name]) for name in scores),
                of_total(line["equal_sequences"]), f"{line['mean_exit_depth']:.2f}", str(line["new_tokens"]),
                f"{line['tokens_per_second']:.1f}", f"{line['tokens_per_second'] / full:.2f} x",
            )
            for line in task["rows"]
        ],
    )  # fmt: skip


def of_total(share: dict) -> str:
    return f"{share['count']} of {share['total']}"


def score(share: dict) -> str:
    """With its standard error, which has no meaning where all or none are right."""
    error = share["standard_error"]
    return of_total(share) + (f" (± {100 * error:.1f} %)" if error else "")


# --- the paper's figures ------------------------------------------------------------------------------------


def correlations() -> str:
    lines = result("paper")["values"]
    head = ("exit depth", *(str(line["depth"]) for line in lines))
    return markdown(head, [("r", *(f"{line['r']:.2f}" for line in lines))])


def drift() -> str:
    found = result("paper")["drift"]
    starts = [found["stretch"] * index for index in range(len(found["settings"][0]["kl"]))]
    return markdown(
        ("KL, nats, of tokens", *(f"{start} to {start + found['stretch'] - 1}" for start in starts)),
        [(line["setting"], *(f"{kl:.3f}" for kl in line["kl"])) for line in found["settings"]],
    )


# --- KV strategies ------------------------------------------------------------------------------------------


def kv_strategies(model: str) -> str:
    (found,) = (found for found in result("kv-strategies")["models"] if found["model"] == model)
    work = ("mean_exit_depth", "backbone_rows", "recomputed_rows", "exit_rows", "projected_rows")
    return block(
        ("", "ms", "x", "agree", "KL, nats", "depth", "backbone", "recomputed", "river", "K and V"),
        [
            (
                line["setting"], f"{line['ms_per_token']:.2f}", f"{line['x_full_bf16']:.2f}",
                f"{100 * line['agreement']:.1f} %", f"{line['kl']:.4f}",
                *(f"{line[name]:.1f}" for name in work),
            )
            for line in found["settings"]
        ],
    )  # fmt: skip


# --- memory -------------------------------------------------------------------------------------------------


def memory_measured() -> str:
    found: dict[str, list[str]] = {}
    for line in result("memory")["memory"]:
        found.setdefault(line["stage"], []).extend((f"{line['anonymous']:.0f}", f"{line['file']:.0f}"))
    head = ("MiB", "whole: anonymous", "of files", "4 layers resident: anonymous", "of files")
    return markdown(head, [(stage, *cells) for stage, cells in found.items()])


def memory_of(name: str) -> str:
    return fenced(memory.table(memory.SHAPES[name], memory.RESIDENT))


def memory_as_the_paper() -> str:
    return fenced(memory.text_of(memory.as_the_paper_counts(memory.SHAPES["Llama-3.1-8B"])))


# --- replicas -----------------------------------------------------------------------------------------------


def scale_serving() -> str:
    lines = result("scale")["serving"]
    engine = ("engine", f"{lines[0]['engine_requests_per_second']:.1f}", "", "")
    return markdown(
        ("", "requests/s", "x engine", "in each turn"),
        [engine]
        + [
            (
                replicas(line), f"{line['requests_per_second']:.1f}", f"{median(line['shares']):.2f}",
                ", ".join(f"{share:.2f}" for share in line["shares"]),
            )
            for line in lines
        ],
    )  # fmt: skip


def scale_offline() -> str:
    return markdown(
        ("", "lines/s", "in each turn", "start, s"),
        [
            (
                replicas(line), f"{line['lines_per_second']:.1f}",
                ", ".join(f"{speed:.1f}" for speed in line["turns"]), f"{line['start_seconds']:.0f}",
            )
            for line in result("scale")["offline"]
        ],
    )  # fmt: skip


def replicas(line: dict) -> str:
    return "one replica" if line["replicas"] == 1 else f"{line['replicas']} replicas"


TABLES: dict[str, Callable[[], str]] = {
    "modes": modes,
    "decode-short": decode_short,
    "decode": decode,
    "lossless": lossless,
    "cycle": cycle,
    "engine": engine,
    "prefill": prefill,
    "serve": serve,
    "serve-pace": pace,
    "peers": peers,
    "peers-text": peers_text,
    "calibrate-demo": lambda: calibrated("calibrate-demo"),
    "calibrate-135M": lambda: calibrated("calibrate-135M"),
    "calibrated-rivers": calibrated_rivers,
    "promises": promises,
    "eval-demo": eval_demo,
    "gsm8k": gsm8k,
    "thresholds": by_threshold,
    "prefill-policies": by_policy,
    "paper-correlations": correlations,
    "paper-drift": drift,
    "kv-strategies-demo": lambda: kv_strategies("bundled"),
    "kv-strategies-135M": lambda: kv_strategies("smol"),
    "memory-measured": memory_measured,
    "scale-serving": scale_serving,
    "scale-offline": scale_offline,
    "memory-8B": lambda: memory_of("Llama-3.1-8B"),
    "memory-1B": lambda: memory_of("Llama-3.2-1B"),
    "memory-paper": memory_as_the_paper,
}
PAPER = [RESULTS / FILES["paper"], RESULTS / FILES["thresholds"]]
# path: the results that it shows, and what draws it
FIGURES: dict[Path, tuple[list[Path], Callable]] = {
    ROOT / "docs" / "thresholds.svg": (PAPER[1:], thresholds.plot),
}
FIGURES |= {
    ROOT / "docs" / "paper" / f"{name}.svg": (PAPER, partial(paper.plot, name)) for name in paper.DRAWN
}

if __name__ == "__main__":
    main()
