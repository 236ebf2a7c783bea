"""What the GPU suite says last, made from its records: short, as only the end of the output may come back.

First what decides how everything else is read, in ten lines; then the parts, kernels, steps, and what failed.
Only the standard library.
"""

CHARACTERS = 8000  # of all of it
FAILED = "FAILED"


def summary(lines: list[dict]) -> str:
    failures = failure_lines(lines)
    sections = [
        clip(essential_lines(lines), 1600),
        clip(part_lines(lines), 1200),
        clip(kernel_lines(lines), 1300),
        clip([*variant_lines(lines), *step_lines(lines)], 1550),
        clip(cycle_lines(lines), 1100),
    ]
    text = "\n\n".join("\n".join(section) for section in sections if section)
    left = CHARACTERS - len(text) - 100
    return f"==== summary\n{text}\n\nfailures: {len(failures) or 'none'}\n" + "\n".join(clip(failures, left))


def clip(lines: list[str], characters: int) -> list[str]:
    """As many of the first lines as fit, and how many do not."""
    kept, size = [], 0
    for line in lines:
        line = line if len(line) <= 240 else line[:237] + "..."
        size += len(line) + 1
        if size > characters - 40 and len(kept) < len(lines) - 1:
            return [*kept, f"... {len(lines) - len(kept)} more lines in the log"]
        kept.append(line)
    return kept


def of(lines: list[dict], record: str, **wanted) -> list[dict]:
    found = (line for line in lines if line["record"] == record)
    return [line for line in found if all(line.get(key) == value for key, value in wanted.items())]


# ---- what decides how the rest is read --------------------------------------------------------------


def essential_lines(lines: list[dict]) -> list[str]:
    result = trigger_lines(lines)
    runs = {line["run"]: line for line in of(lines, "run", part="check")}
    said = {line["check"]: line["text"] for line in of(lines, "check")}
    for name in sorted(
        runs, key=lambda name: ["ring", "edges"].index(name) if name in ("ring", "edges") else 2
    ):
        status = "ok" if runs[name]["status"] == "passed" else FAILED
        result.append(f"{name}: {status}: {said.get(name) or runs[name]['reason']}")
    rates = [round(line["gb_s"]) for line in of(lines, "ceiling")]
    if rates and "ring" not in said:
        result.insert(len(trigger_lines(lines)), f"ring: {min(rates)} to {max(rates)} GB/s read-only")
    if tests := of(lines, "test"):
        names = {
            word: {t["test"] for t in tests if t["outcome"] == word}
            for word in ("passed", "failed", "skipped")
        }
        result.append("tests: " + ", ".join(f"{len(found)} {word}" for word, found in names.items()))
    return result


def trigger_lines(lines: list[dict]) -> list[str]:
    """Each variant beside the default on the step that was measured first, the trigger's on top."""
    compared = variants_of(lines)
    if not compared:
        return ["trigger, early against late: not compared"] if of(lines, "step") else []
    first = [line for line in compared if all(line[key] == compared[0][key] for key in ("model", "depth"))]
    return [
        f"{line['variant']}: {change(line):+.1f} % time of a {line['model']} step at depth {line['depth']} "
        f"({line['device']['us']:.0f} us, default {line['beside_us']:.0f}, spread "
        f"{line['device']['spread_percent']:.1f} %)"
        for line in sorted(first, key=lambda line: "trigger" not in line["variant"])
    ]


def variants_of(lines: list[dict]) -> list[dict]:
    return [line for line in of(lines, "step") if line["variant"]]


def change(line: dict) -> float:
    """% more time than the default took in turns with it."""
    return 100 * (line["device"]["us"] / line["beside_us"] - 1)


# ---- tables -----------------------------------------------------------------------------------------


def part_lines(lines: list[dict]) -> list[str]:
    result = []
    for name in dict.fromkeys(line["part"] for line in of(lines, "run")):
        runs = of(lines, "run", part=name)
        bad = [run for run in runs if run["status"] != "passed"]
        state = bad[0]["status"] if bad else "passed"
        reasons = "; ".join(f"{run['run']}: {run['reason']}"[:160] for run in bad)
        result.append(f"{name:<10} {state:<8} {sum(run['seconds'] for run in runs):6.1f} s  {reasons}")
    return result


def kernel_lines(lines: list[dict]) -> list[str]:
    """% of the ring's ceiling over the shapes of a kernel, and x torch, by rows."""
    result = []
    kernels = [line for line in of(lines, "kernel") if not line["variant"]]
    for kernel, rows in dict.fromkeys((line["kernel"], line["rows"]) for line in kernels):
        found = of(kernels, "kernel", kernel=kernel, rows=rows)
        percents = [line["percent_of_ceiling"] for line in found]
        times = [line["x_torch"] for line in found if line["x_torch"]]
        text = f"{kernel:<16} T={rows}, {len(found)} shapes: {min(percents):.0f} to {max(percents):.0f} %"
        result.append(
            f"{text} of the ring" + (f", {min(times):.2f} to {max(times):.2f} x torch" if times else "")
        )
    return result


def step_lines(lines: list[dict]) -> list[str]:
    """The design's table, then the other steps."""
    steps = [line for line in of(lines, "step") if not line["variant"]]
    if not steps:
        return []
    head = "| batch 1, context 1k: us | floor | measured | x floor | goal | kernels | control | "
    result = [f"{head}generate: host, device | best public |", "|" + "---|" * 9]
    for line in steps:
        if line["goal"]:
            same = {key: line[key] for key in ("model", "depth")}
            wall = [f"{found['us']:.0f}" for found in of(lines, "generate", **same)]
            result.append(
                f"| {line['model']}, exit depth {line['depth']} of {line['layers']} | "
                f"{line['floor_us']:.0f} | {line['device']['us']:.0f} | {line['x_floor']:.3f} | "
                f"{line['goal']} {'met' if line['x_floor'] <= line['goal'] else 'MISSED'} | "
                f"{line['kernels']['us']:.0f} | {line['control_us']:.1f} | {', '.join(wall) or '-'} | "
                f"{line['best_public']} |"
            )
    return result + [
        f"{line['model']} depth {line['depth']:>2} T={line['rows']} context {line['context']:>4}: "
        f"{line['device']['us']:.0f} us, {line['x_floor']:.2f} x floor"
        for line in steps
        if not line["goal"]
    ]


def variant_lines(lines: list[dict]) -> list[str]:
    """% time against the default, by step."""
    compared, result = variants_of(lines), []
    for variant in dict.fromkeys(line["variant"] for line in compared):
        found = [
            f"{line['model']} depth {line['depth']} {change(line):+.1f}"
            for line in compared
            if line["variant"] == variant
        ]
        result.append(f"{variant}, % time: {', '.join(found)}")
    return result


def cycle_lines(lines: list[dict]) -> list[str]:
    """Lossless cycles in a table, then steps whose rows take both paths."""
    cycles, result = of(lines, "cycle"), []
    if cycles:
        gains = " | ".join(f"x full at {at}" for at in cycles[0]["x_full"])
        result = [
            f"| lossless: drafts x requests, us | floor | measured | x floor | by host | full | {gains} |",
            "|" + "---|" * (6 + len(cycles[0]["x_full"])),
        ]
    for line in cycles:
        goal, goals, x_floor = line["goal"], line["goal_x_full"] or {}, line["x_floor"]
        gains = " | ".join(
            f"{gain:.2f}{verdict(goals.get(at), gain >= goals.get(at, 0))}"
            for at, gain in line["x_full"].items()
        )
        result.append(
            f"| {line['model']}, {line['drafts']} x {line['requests']} | {line['floor_us']:.0f} | "
            f"{line['cycle']['us']:.0f} | {x_floor:.3f}{verdict(goal, x_floor <= (goal or 0))} | "
            f"{line['by_host']['us']:.0f} | {line['full']['us']:.0f} | {gains} |"
        )
    for line in of(lines, "mixed"):
        mixed, dense, packed = (line[name]["us"] for name in ("mixed", "dense", "packed"))
        result.append(
            f"{line['model']} T={line['rows']}, half leave at {line['depth']}: {mixed:.0f} us, "
            f"{line['x_floor']:.2f} x floor; all dense {dense:.0f}, packed {packed:.0f}"
        )
    return result


def verdict(goal: float | None, met: bool) -> str:
    return "" if goal is None else f" ({goal} {'met' if met else 'MISSED'})"


def failure_lines(lines: list[dict]) -> list[str]:
    """Runs, then tests; tests that failed alike share a line."""
    result = [
        f"{run['part']} {run['run']}: failed: {run['reason']}" for run in of(lines, "run", status="failed")
    ]
    result += [
        f"{line['model']} {line['what']}: {line['reason']}" for line in of(lines, "not run", part="steps")
    ]
    alike, seen = {}, set()
    for line in of(lines, "test", outcome="failed"):
        if line["test"] not in seen:  # a worker that ends is reported once more
            seen.add(line["test"])
            alike.setdefault(line["reason"], []).append(line["test"])
    for reason, tests in alike.items():
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        result.append(f"{tests[0]}{more}: {reason}")
    return result
