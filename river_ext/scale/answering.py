"""What a replica does with lines of a file, and how often it tries.

A line may end the process that works on it, by a fault or for want of memory, and Ray Data would start
another one for ever. So an actor beside the replicas counts: lines whose replica has died are tried again one
by one, and a line at which it then dies ALONE times has an error for an answer. The others lose nothing. An
exception of the engine, after which nothing of a process can be trusted, ends it as well.
"""

import json
import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from ..engine.engine import Engine
from ..errors import RiverError
from .lines import prompt_of
from .replica import Replica

ALONE = 2  # tries of a line by itself, after one among others
LOADS = 3  # tries of each replica to load the model
OUTPUT = ("text", "tokens", "exit_depths", "finish_reason", "logprobs", "top_logprobs")
DEADLY = f"each of {ALONE + 1} tries of this line has ended its replica, {ALONE} of them with no other line"


class Tries:
    """The actor that counts. Replicas tell it what they begin, before they do."""

    def __init__(self, replicas: int):
        self._most_loads = LOADS * replicas
        self._loads = 0  # since a replica has last begun with lines
        self._several: Counter[int] = Counter()  # by the number of the first of these lines
        self._alone: Counter[int] = Counter()
        self._answers: dict[int, dict] = {}  # of lines by themselves
        self._causes: dict[int, str] = {}  # of deaths, where they are known

    def load(self) -> int | None:
        """How often replicas have died while they loaded, if it is too often."""
        self._loads += 1
        return self._loads - 1 if self._loads > self._most_loads else None

    def several(self, first: int) -> bool:
        """Whether these lines, of which that is the first, have never been begun."""
        self._loads = 0
        self._several[first] += 1
        return self._several[first] == 1

    def alone(self, number: int) -> dict | None:
        """The answer of a line that needs no other try."""
        if number not in self._answers:
            if self._alone[number] < ALONE:
                self._alone[number] += 1
                return None
            cause = self._causes.get(number, "its process was killed, for want of memory perhaps")
            self._answers[number] = {"error": f"{DEADLY} ({cause})"}
        return self._answers[number]

    def answered(self, number: int, answer: dict) -> None:
        self._answers[number] = answer

    def failed(self, number: int, cause: str) -> None:
        self._causes[number] = cause


def count_tries(replicas: int) -> ActorHandle:
    """Starts the actor. It takes no core, and ends with the driver."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote(replicas)


class Answering:
    """A replica: Ray Data makes one in each process, and calls it with rows."""

    def __init__(self, replica: Replica, options: Mapping, tries: ActorHandle):
        if deaths := ray.get(tries.load.remote()):
            raise RiverError(
                f"replicas have died {deaths} times while they loaded the model; accepted: memory for "
                "each, and a model that a single process can load"
            )
        self.model, self.engine = replica.load()
        self.options, self.tries = options, tries

    def __call__(self, rows: Mapping[str, Sequence]) -> dict[str, list[str]]:
        """rows: `number` and `line`, JSON, of each."""
        lines = {int(n): json.loads(line) for n, line in zip(rows["number"], rows["line"], strict=True)}
        try:
            return {"answer": [json.dumps(answer) for answer in self._answers(lines)]}
        except RayError:  # the run has ended
            raise
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _answers(self, lines: dict[int, dict]) -> list[dict]:
        if ray.get(self.tries.several.remote(next(iter(lines)))):
            return answers_of(self.engine, list(lines.values()), self.options)
        return [self._alone(number, fields) for number, fields in lines.items()]

    def _alone(self, number: int, fields: dict) -> dict:
        if answer := ray.get(self.tries.alone.remote(number)):
            return answer
        try:
            (answer,) = answers_of(self.engine, [fields], self.options)
        except Exception as error:
            cause = str(RiverError(f"{type(error).__name__}: {str(error)[:200]}"))
            ray.get(self.tries.failed.remote(number, cause))
            raise
        ray.get(self.tries.answered.remote(number, answer))
        return answer


def answers_of(engine: Engine, lines: Sequence[dict], options: Mapping) -> list[dict]:
    """Of some lines, through the slots of an engine."""
    answers = [{}] * len(lines)
    for index, fields in enumerate(lines):
        try:
            engine.submit(prompt_of(fields), id=index, **(options | fields.get("options", {})))
        except RiverError as error:
            answers[index] = {"error": str(error)}
    for event in engine:
        if event.output:
            found = event.output.to_dict()
            output = {name: found[name] for name in OUTPUT if found[name] is not None}
            answers[event.id] = {"error": found["error"]} if found["error"] else {"output": output}
    return answers
