"""A model for lm-evaluation-harness, by the name `river`, and the harness's tasks as rows of a table.

    python -m river_ext.evaluation.harness run --model river --model_args path=DIR,threshold=0.9 --tasks boolq

is the harness's own command with this model registered, as its model guide has it. The harness loads the
datasets of its tasks from the network; with documents of this machine nothing is loaded from anywhere.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import groupby
from pathlib import Path

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval import simple_evaluate, utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from ..checks import choice, integer
from ..engine.generate import SCORE_BY
from ..engine.request import request
from ..errors import RiverError
from ..loading.chat import read_template
from ..model import Model, load
from .harness_tasks import task_manager, with_documents
from .measure import Row, Setting, depth_row
from .tasks import MAX_GEN_TOKS, continued, fitted

# what the harness raises where a task or its documents are not as it expects
ODD = (ValueError, LookupError, TypeError, AttributeError, OSError, ImportError, TemplateError, DatasetsError)
SCORE_OPTIONS = signature(Model.score).parameters.keys()
UNNAMED_DEVICE = "cuda:0"  # what the harness's command gives every model where nobody has named a device


@register_model("river")
class RiverLM(TemplateLM):
    """A model with the options that all its requests have.

    Args:
        path, device, dtype, river, resident_layers, calibrated: as in `river_ext.load`.
        model: one that is loaded already, in place of these.
        score_by: how log-likelihoods are computed. "prefill", as other models of the harness do it: context
            and continuation in one pass, where decoding's exits have no say. "steps": every token of the
            continuation is predicted by a decoding step, and may exit.
        batch_size: prompts that generate together, 1 to 8.
        max_gen_toks: new tokens where a task names no number.
        options: keyword arguments of `Model.generate`: mode, threshold, ...
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        model: Model | None = None,
        device: str = "auto",
        dtype: str = "auto",
        river: str | None = None,
        resident_layers: int | None = None,
        calibrated: str | None = None,
        score_by: str = "prefill",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        **options,
    ):
        super().__init__()
        choice("score_by", score_by, SCORE_BY)
        batch_size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        self.batch_size = integer("batch_size", batch_size, 1, 8)
        self.max_gen_toks = integer("max_gen_toks", max_gen_toks, 1)
        self.model = model or load(path, device, dtype, river, resident_layers, calibrated)
        request(self.model.config, None, [0], options | {"max_new_tokens": 1})  # refused before hours of work
        self.score_by, self.options = score_by, options
        self.max_length = self.model.config.max_length
        self.depths: list[int] = []  # of all tokens so far, generated or scored
        self.speeds: list[float] = []  # decoded tokens per decoding second, by call of generate

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping, additional_config: Mapping | None = None) -> "RiverLM":
        """From `model_args` and, where these are silent, the command's own options."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == UNNAMED_DEVICE:
            del options["device"]  # the machine's own, as with the harness's other models
        return cls(**options | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping | None = None) -> "RiverLM":
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        ids = self.model.config.eos_token_ids
        return min(ids) if ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        config = self.model.config
        found = [token for token in (config.bos_token_id, *sorted(config.eos_token_ids)) if token is not None]
        return found[0] if found else 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is False:
            return self.model.tokenizer.encode(string, add_special_tokens=False).ids
        return self.model.text.encode(string)

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.directory)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        names = [chat_template] if isinstance(chat_template, str) else []
        return read_template(self.model.directory, *names)[1] if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        text = self.model.text
        return text.chat_text(chat_history) if add_generation_prompt else continued(text, chat_history)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="river: generate") as bar:
            for kwargs, group in groupby((one.args for one in requests), key=lambda args: args[1]):
                contexts = [context for context, _ in group]
                for start in range(0, len(contexts), self.batch_size):
                    batch = contexts[start : start + self.batch_size]
                    found = self._generate(batch, kwargs)
                    for context, text in zip(batch, found, strict=True):
                        self.cache_hook.add_partial("generate_until", (context, kwargs), text)
                    texts += found
                    bar.update(len(batch))
        return texts

    def _generate(self, contexts: list[str], kwargs: Mapping) -> list[str]:
        kwargs = normalize_gen_kwargs(kwargs, self.max_gen_toks)
        stop, new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        kwargs.pop("do_sample")  # the temperature is 0 without it
        outputs = self.model.generate(
            [fitted(self.model, context, new_tokens) for context in contexts],
            max_new_tokens=new_tokens,
            stop=[text for text in stop if text],
            **kwargs | self.options,
        )
        for output in outputs:
            self.depths += output.checked().exit_depths
        decoded = sum(len(output.tokens) - 1 for output in outputs)
        if decoded:
            self.speeds.append(decoded / max(output.stats.decode_seconds for output in outputs))
        return [output.text for output in outputs]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        answers = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="river: score"):
            answers.append(self._loglikelihood(context, continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not 0 < len(continuation) < self.max_length:
            raise RiverError(
                f"a continuation of {len(continuation)} tokens; accepted: 1 to {self.max_length - 1}"
            )
        tokens = (context + continuation)[-self.max_length :]
        length = len(tokens) - len(continuation)
        if self.score_by == "steps":
            length = max(
                1, length - 1
            )  # the last token of the context is a step: one-token answers exit, too
        options = {name: value for name, value in self.options.items() if name in SCORE_OPTIONS}
        score = self.model.score(tokens, prompt_length=length, by=self.score_by, **options)
        logits, depths = score.logits[-len(continuation) :], score.exit_depths[-len(continuation) :]
        self.depths += depths
        wanted = logits.new_tensor(continuation, dtype=int)
        logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])
        return logprobs.sum().item(), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        answers = []
        for (text,) in (one.args for one in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length - 1, context_len=1
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            answers.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs, disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers


@dataclass(frozen=True)
class Estimate:
    """A metric as the harness gives it, the mean over `total` documents."""

    value: float
    standard_error: float | None
    total: int

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {100 * self.standard_error:.1f}"
        return f"{100 * self.value:.1f}{error} %"


def evaluate(
    model: Model,
    task: str,
    settings: Sequence[Setting],
    *,
    data: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    max_gen_toks: int | None = None,
    score_by: str = "prefill",
) -> list[Row]:
    """One row for each setting.

    Args:
        task: the name of one of the harness's tasks, groups or tags.
        data: a folder with <task>/<split>.jsonl in place of the dataset, for each task and split.
        limit: documents, the first ones.
        chat: prompts go through the model's chat template.
        max_gen_toks: new tokens, in place of the task's own limit.
    """
    rows, manager = [], task_manager()
    with with_documents(manager, task, data):
        for setting in settings:
            lm = RiverLM(model=model, score_by=score_by, **setting.options)
            try:
                results = simple_evaluate(
                    lm,
                    tasks=[task],
                    task_manager=manager,
                    limit=limit,
                    apply_chat_template=chat,
                    gen_kwargs={"max_gen_toks": max_gen_toks} if max_gen_toks else None,
                    log_samples=False,
                )
            except ODD as error:
                raise RiverError(f"task {task[:80]!r}: lm-evaluation-harness says: {error}") from error
            accuracy = _estimates(task, results)
            rows.append(depth_row(setting, accuracy, lm.depths, lm.speeds, model.config.num_hidden_layers))
    return rows


def _estimates(task: str, results: Mapping) -> dict[str, Estimate]:
    """By metric and filter; of a tag, which has no result of its own, by its tasks' names too."""
    found = results["results"]
    names = [task] if task in found else list(found)
    counts = {name: sample["effective"] for name, sample in results["n-samples"].items()}
    estimates = {}
    for name in names:
        for key, value in found[name].items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = found[name].get(f"{metric}_stderr,{filtered}")
                error = error if isinstance(error, float) and math.isfinite(error) else None
                label = " ".join(part for part in (name if len(names) > 1 else "", metric) if part)
                label += "" if filtered in ("", "none") else f" {filtered}"
                estimates[label] = Estimate(value, error, counts.get(name, sum(counts.values())))
    return estimates


def main() -> None:
    """The harness's command; what is wrong with its arguments or documents is said in one line."""
    try:
        cli_evaluate()
    except (RiverError, *ODD) as error:
        print(f"river: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
