"""Published tasks on documents of this machine, without lm-evaluation-harness and without a network.

Prompts, examples, stop strings, limits and scores are those of the harness's tasks of the same names, in its
version 0.4.13; the tests compare with the harness itself. Its other tasks run through harness.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..errors import RiverError
from ..loading.text import Text
from ..model import Model
from . import sandbox
from .documents import read_documents
from .measure import Item

SHOTS_SEED = 1234  # the harness's, for the choice of examples
MAX_GEN_TOKS = 256  # the harness's, for tasks that name no other limit

# --- gsm8k --------------------------------------------------------------------------------------------------

GSM8K_SHOTS = 5
GSM8K_STOP = ("Question:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
INVALID = "[invalid]"  # what a filter gives where it finds nothing
IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]


def strict_match(text: str) -> str:
    """The first answer that is written as the examples write theirs: `#### 42`."""
    found = STRICT.findall(text)
    return found[0].strip() if found else INVALID


def flexible_extract(text: str) -> str:
    """The last number."""
    found = FLEXIBLE.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else INVALID


def same_number(answer: str, solution: str) -> bool:
    """Whether they are the same text, but for commas, dollars, a last period and what is before `####`."""
    return _bare(answer) == _bare(solution)


def _bare(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def gsm8k(data: Path, limit: int | None, chat: bool) -> list[Item]:
    fields = ("question", "answer")
    train = read_documents(data, "gsm8k", "train", fields)
    if len(train) < GSM8K_SHOTS:
        raise RiverError(f"gsm8k: {len(train)} documents to draw examples from; accepted: {GSM8K_SHOTS}")
    random = Random(SHOTS_SEED)
    items = []
    for document in read_documents(data, "gsm8k", "test", fields)[:limit]:
        shots = random.sample(train, GSM8K_SHOTS)
        turns = [(f"Question: {one['question']}\nAnswer:", one["answer"]) for one in (*shots, document)]
        items.append(Item(_prompt(turns, chat), _gsm8k_checks(document["answer"])))
    return items


def _gsm8k_checks(solution: str) -> dict[str, Callable[[str], bool]]:
    return {
        "strict-match": lambda text: same_number(strict_match(text), solution),
        "flexible-extract": lambda text: same_number(flexible_extract(text), solution),
    }


def _prompt(turns: Sequence[tuple[str, str]], chat: bool) -> str | list[dict]:
    """Questions with their answers, then the last one's question, as text or as chat messages."""
    question = turns[-1][0]
    if not chat:
        return "".join(f"{asked} {answer}\n\n" for asked, answer in turns[:-1]) + question
    messages = []
    for asked, answer in turns[:-1]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]


# --- humaneval ----------------------------------------------------------------------------------------------

HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_MAX_GEN_TOKS = 1024
ASKED = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{prompt}\n```\n"
)
BEGUN = "Here is the completed function:\n```python\n{prompt}\n"


def humaneval(data: Path, limit: int | None, chat: bool) -> list[Item]:
    if chat:
        raise RiverError(
            "humaneval with a chat template; accepted: without one, as it is code to go on with; "
            "or humaneval_instruct"
        )
    return [Item(one["prompt"], {"pass@1": _passes(one)}) for one in _programs(data, limit)]


def humaneval_instruct(data: Path, limit: int | None, chat: bool) -> list[Item]:
    """A question and the beginning of its answer, which ends with its block of code."""
    items = []
    for document in _programs(data, limit):
        asked, begun = (text.replace("{prompt}", document["prompt"]) for text in (ASKED, BEGUN))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]
        passes = _passes(document)
        check = {"pass@1": lambda text, passes=passes: passes(text.partition("```")[0])}
        items.append(Item(messages if chat else asked + begun, check))
    return items


def _programs(data: Path, limit: int | None) -> list[dict]:
    return read_documents(data, "humaneval", "HumanEval", ("prompt", "entry_point", "test"))[:limit]


def _passes(document: dict) -> Callable[[str], bool]:
    test = f"{document['test']}\ncheck({document['entry_point']})"
    return lambda text: sandbox.run(f"{document['prompt']}{text}\n{test}") == sandbox.PASSED


# --- all of them --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    items: Callable[[Path, int | None, bool], list[Item]]  # data folder, at most so many, as chat messages
    shots: int
    stop: tuple[str, ...]
    max_gen_toks: int
    runs_code: bool = False


TASKS = {
    "gsm8k": Task(gsm8k, GSM8K_SHOTS, GSM8K_STOP, MAX_GEN_TOKS),
    "humaneval": Task(humaneval, 0, HUMANEVAL_STOP, HUMANEVAL_MAX_GEN_TOKS, runs_code=True),
    "humaneval_instruct": Task(humaneval_instruct, 0, HUMANEVAL_STOP, HUMANEVAL_MAX_GEN_TOKS, runs_code=True),
}


def fitted(model: Model, prompt: str | list, max_new_tokens: int) -> list[int]:
    """The tokens of a prompt: its end, as the harness cuts it, if with the new ones they are too many."""
    room = model.config.max_length - max_new_tokens
    if room < 1:
        raise RiverError(
            f"max_gen_toks={max_new_tokens} and the model has {model.config.max_length} positions; accepted: "
            "fewer new tokens"
        )
    if model.text is None:
        raise RiverError("tasks need a tokenizer, and this checkpoint has no tokenizer.json")
    return _tokens(model.text, prompt)[-room:]


def _tokens(text: Text, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return text.encode(prompt)
    if prompt[-1]["role"] == "user":
        return text.chat(prompt)
    return text.encode(continued(text, prompt))


def continued(text: Text, messages: list[dict]) -> str:
    """What the template writes up to the end of the last message, which the model goes on with.

    Spaces at its ends are kept or not, as the template has it: so does transformers.
    """
    last, written = messages[-1]["content"], text.chat_text(messages, add_generation_prompt=False)
    start = written.rindex(last.strip())
    kept = written.startswith(last.lstrip(), start)
    return written[: start + len(last.lstrip() if kept else last.strip())]
