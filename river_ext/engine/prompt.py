"""The forms of a prompt: text, token ids, chat messages, what tokenizers return; and lists of these."""

from collections.abc import Mapping
from numbers import Real

from ..checks import listed, one_row, token_ids
from ..errors import RiverError
from ..loading.config import ModelConfig
from ..loading.text import Text


def is_batch(prompt) -> bool:
    """Whether a prompt is a list of prompts: one whose first item is neither token id nor chat message."""
    return prompt_list(prompt)[1]


def prompt_list(prompt) -> tuple[list, bool]:
    """The prompts in what a user gives, and whether that is a list of them."""
    if isinstance(prompt, Mapping):  # as the tokenizers of transformers return
        prompt = encoded(prompt)
    prompt = one_row("prompt", prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return [prompt], False
    if isinstance(listed("prompt", prompt[0]), Real):  # a token id
        return [prompt], False
    return ([prompt], False) if is_chat(prompt) else (list(prompt), True)


def is_chat(prompt) -> bool:
    """Whether a prompt is a list of chat messages: one whose first item is a dict, but of no token ids."""
    first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else None
    return isinstance(first, Mapping) and "input_ids" not in first


def encoded(encoding: Mapping):
    """The token ids of an encoding, without those that its attention_mask leaves out."""
    if "input_ids" not in encoding:
        raise RiverError(
            f"prompt is a {type(encoding).__name__} without input_ids; accepted: one with them, or a list of "
            "chat messages"
        )
    ids = one_row("input_ids", encoding["input_ids"])
    mask = encoding.get("attention_mask")
    if mask is None:
        return ids
    mask = one_row("attention_mask", mask)
    try:
        nested = bool(ids) and isinstance(ids[0], (list, tuple))
        pairs = zip(ids, mask, strict=True) if nested else [(ids, mask)]
        kept = [[i for i, keep in zip(*pair, strict=True) if keep] for pair in pairs]
    except (TypeError, ValueError, KeyError):
        raise RiverError("attention_mask does not fit input_ids; accepted: one value per token") from None
    return kept if nested else kept[0]


def prompt_tokens(config: ModelConfig, text: Text | None, prompt) -> list[int]:
    if isinstance(prompt, str) or is_chat(prompt):
        if text is None:
            raise RiverError("a text prompt needs a tokenizer, and this checkpoint has no tokenizer.json")
        prompt = text.chat(prompt) if is_chat(prompt) else text.encode(prompt) if prompt else []
    elif isinstance(prompt, Mapping):
        prompt = encoded(prompt)
    prompt = one_row("prompt", prompt)
    if isinstance(prompt, (list, tuple)):
        prompt = [listed("prompt", token) for token in prompt]  # each may be an array of one itself
    tokens = token_ids("prompt", prompt, config.vocab_size)
    if not tokens:
        raise RiverError("the prompt is empty; accepted: at least one token")
    return tokens
