"""A calibrated river: HQQ's, refined with texts, and how much closer that brought it to the backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from .. import ops
from ..engine.network import Network
from ..errors import RiverError
from ..loading.checkpoint import Checkpoint
from ..loading.text import Text
from ..loading.weights import BlockShape, ExitLayerWeights
from ..progress import progress_bar
from ..quant.exit_river import ExitRiver
from .agreement import Agreement, compare
from .refine import Refinement
from .unfinished import UnfinishedRiver

MAX_TEXTS, MAX_TOKENS = 512, 512  # the first texts, and the first tokens of each, are used
MAX_TOKEN_CHARACTERS = 16  # more of a text is not encoded
MIN_TOKENS = 1024
HELD_OUT = 8  # every eighth text is not calibrated on


@dataclass(frozen=True)
class CalibrationTexts:
    """Token ids."""

    used: list[list[int]]
    held_out: list[list[int]]


def calibration_texts(checkpoint: Checkpoint, texts: Sequence[str], source: str) -> CalibrationTexts:
    """Encodes texts and sets some aside; `source` is what error messages call them."""
    if checkpoint.tokenizer is None:
        raise RiverError(f"{checkpoint.directory}: no tokenizer.json, which calibration texts need")
    text = Text(checkpoint.tokenizer, checkpoint.config, checkpoint.directory)
    longest = min(MAX_TOKENS, checkpoint.config.max_length)
    encoded = [text.encode(part[: longest * MAX_TOKEN_CHARACTERS])[:longest] for part in texts[:MAX_TEXTS]]
    encoded = [tokens for tokens in encoded if tokens]
    used = [tokens for number, tokens in enumerate(encoded) if number % HELD_OUT != HELD_OUT - 1]
    held_out = encoded[HELD_OUT - 1 :: HELD_OUT]
    count = sum(map(len, used))
    if not held_out or count < MIN_TOKENS:
        raise RiverError(
            f"{source}: {len(encoded)} texts, {count} tokens in those to calibrate on; accepted: at least "
            f"{HELD_OUT} texts, {MIN_TOKENS} tokens; better some hundred texts of 100 tokens and more"
        )
    return CalibrationTexts(used, held_out)


def calibrate_river(
    checkpoint: Checkpoint, river: ExitRiver, texts: CalibrationTexts, path: Path, progress: bool = True
) -> ExitRiver:
    """The river of `build_river`, refined; its `calibration` says what that was worth.

    Every layer is kept in the directory `path` as soon as it is done, until `save_river` has written them all
    there. Called again after an interruption, this goes on behind the last one, to the same bits.
    """
    config, weights = checkpoint.config, checkpoint.weights
    network = Network(config, weights, river)
    facts = {
        "version": ops._C.build_info()["version"],
        "fingerprint": checkpoint.fingerprint,
        "dtype": str(network.dtype),
        "device": network.device.type,
        "group_size": river.group_size,
        "texts": texts.used,
    }
    unfinished = UnfinishedRiver(path, facts, BlockShape.of(config))
    before = compare(network, texts.held_out)
    refinement, layers = Refinement(network, texts.used, river.group_size), []
    with progress_bar("calibrating", 4 * config.num_hidden_layers, progress) as advance:
        try:
            for index in range(config.num_hidden_layers):
                layers.append(_layer(refinement, unfinished, index, advance))
        except RiverError:
            unfinished.discard()
            raise
        except (OSError, SafetensorError) as error:
            raise RiverError(
                f"{path}: cannot be written ({error}); a folder with free space is needed"
            ) from None
    refined = ExitRiver(layers, river.lm_head, river.group_size, "gptq")
    after = compare(Network(config, weights, refined), texts.held_out)
    refined.calibration = _facts(texts, before, after)
    return refined


def _layer(
    refinement: Refinement, unfinished: UnfinishedRiver, index: int, advance: Callable[[], None]
) -> ExitLayerWeights:
    """The next layer, as it was left there or refined now."""
    layer = unfinished.load(index, refinement.network.device)
    if layer is None:
        layer = refinement.refine(index, advance)
        unfinished.save(index, layer)
        return layer
    refinement.follow(index, layer)
    for _ in range(4):
        advance()
    return layer


def _facts(texts: CalibrationTexts, before: Agreement, after: Agreement) -> dict:
    """What a river says of its calibration: agreement and KL on the texts that were held out."""
    return {
        "texts": len(texts.used),
        "tokens": sum(map(len, texts.used)),
        "held_out_tokens": before.tokens,
        "agreement_before": before.agreement,
        "agreement": after.agreement,
        "kl_before": before.kl,
        "kl": after.kl,
    }
