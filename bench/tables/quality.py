"""Tables of what exits and 4 bits cost, and what is promised of it: TABLES, by the names of their places."""

from bench.cpu import thresholds
from bench.lib.prose import demo_rows, kv_settings
from bench.lib.results import result
from bench.tables.layout import block, markdown, percent, threads
from river_ext.thresholds.guarantee import fewest_answers, upper_bound


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


def kv_strategies(model: str) -> str:
    work = ("mean_exit_depth", "backbone_rows", "recomputed_rows", "exit_rows", "projected_rows")
    return block(
        ("", "ms", "x", "agree", "KL, nats", "depth", "backbone", "recomputed", "river", "K and V"),
        [
            (
                line["setting"], f"{line['ms_per_token']:.2f}", f"{line['x_full_bf16']:.2f}",
                f"{100 * line['agreement']:.1f} %", f"{line['kl']:.4f}",
                *(f"{line[name]:.1f}" for name in work),
            )
            for line in kv_settings(model)
        ],
    )  # fmt: skip


TABLES = {
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
}
