"""How a tokenizer is built from a checkpoint's files; run as a script, whether that is safe to do.

Loading and using a tokenizer.json can abort or hang the process, past any exception handler. So a process of
its own does it first, under limits of memory and time. This file imports neither torch nor the rest of the
package and runs by its path, so that such a trial takes little longer than the tokenizer takes to load.
"""

import json
import math
import resource
import sys

MEMORY = 4 << 30  # bytes of address space
CPU_SECONDS = 30
MAX_GROWTH = 100  # characters or tokens that may be made of one character
SAMPLE = (
    "".join(map(chr, range(256)))
    + " The quick brown fox jumps over 1,234,567 lazy dogs; isn't it?\r\n\t\t    x = [0.5] * 10\n\n"
    + "Größe naïve Ελλάδα Москва עברית العربية हिन्दी ไทย 中文字符 日本語 한국어 "
    + "\u2581 \u1000 \U0001f600 \ufffd \u0301 e\u0301"
)
REPEATED = 2000  # times a character comes in texts that expressions may backtrack on
DECODED = 1000  # tokens of the vocabulary that are decoded together


def build(document: bytes, settings: dict):
    """The tokenizer of a tokenizer.json with what the files beside it say, as in transformers.

    The listed tokens come first, by id; where tokenizer_config.json lists none, those of tokenizer.json go
    before others of the same id. Special tokens that are new follow. Text is encoded whole and as it is,
    without the truncation, padding and dropout of the training.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_buffer(document)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    there = tokenizer.get_added_tokens_decoder()
    listed = {index: AddedToken(**token) for index, token in settings["listed"]}
    if settings["legacy"]:
        listed |= there
    tokens = [listed[index] for index in sorted(listed)]
    named = {token["content"] for token in settings["named"]}
    for token in tokens:
        token.special |= token.content in named
    known = {token.content for token in (*there.values(), *tokens)}
    special = {token["content"]: AddedToken(**token) for token in settings["named"] + settings["extra"]}
    tokenizer.add_tokens(tokens + [token for content, token in special.items() if content not in known])
    tokenizer.encode_special_tokens = settings["split_special_tokens"]
    return tokenizer


def stages(part) -> list[dict]:
    """The steps of a normalizer or decoder as in JSON, those of sequences in sequence."""
    step = json.loads(part.__getstate__()) if part is not None else {"type": "Sequence"}
    return _flat(step)


def _flat(step: dict) -> list[dict]:
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("normalizers") or step.get("decoders") or []
    return [stage for part in inner for stage in _flat(part)]


def growth(steps: list[dict]) -> float:
    """Characters that the replacements among the steps make of one at most."""
    from tokenizers import Regex
    from tokenizers.normalizers import Replace

    factors = []
    for step in steps:
        if step["type"] == "Replace":
            content, literal = step["content"], step["pattern"].get("String")
            shortest = len(literal) if literal else 1
            factors.append(len(content) / shortest)
            if literal is None:
                made = Replace(Regex(step["pattern"]["Regex"]), content).normalize_str("a")
                factors[-1] += len(made) > max(1, len(content))  # it matches nothing before a character
    return math.prod(max(1.0, factor) for factor in factors)


def try_out(tokenizer) -> None:
    """Encodes and decodes what may bring trouble to light; raises where it grows out of bounds."""
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        times = growth(stages(part))
        if times > MAX_GROWTH:
            raise ValueError(f"the {name} makes {times:.3g} characters of one; accepted: {MAX_GROWTH}")
    texts = ["", "a", SAMPLE, *(character * REPEATED + "!" for character in "a 0\n")]
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor):
        texts.append(part.__getstate__().decode()[: 1 << 16] if part is not None else "")
    for text in texts:
        most = MAX_GROWTH * (len(text) + 1)
        if tokenizer.normalizer and len(tokenizer.normalizer.normalize_str(text)) > most:
            raise ValueError(f"the normalizer makes more than {most} characters of {len(text)}")
        ids = tokenizer.encode(text).ids
        if len(ids) > most:
            raise ValueError(f"{len(text)} characters become {len(ids)} tokens; accepted: {most}")
        if ids:  # a decoder that strips at the end fails without
            tokenizer.decode(ids, skip_special_tokens=False)
    everything = sorted(tokenizer.get_vocab().values())
    for first in range(0, len(everything), DECODED):
        tokenizer.decode(everything[first : first + DECODED], skip_special_tokens=False)


def complaint_of(error: BaseException) -> str:
    """What the tokenizers library says in an exception; its panics are no `Exception`."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
    return str(error) or type(error).__name__


def main() -> int:
    """Settings in the first line of the standard input, tokenizer.json after it; the complaint goes out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    settings, _, document = sys.stdin.buffer.read().partition(b"\n")
    try:
        try_out(build(document, json.loads(settings)))
    except BaseException as error:
        print(complaint_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
