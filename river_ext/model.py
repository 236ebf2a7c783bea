"""The model that a user holds: load it, generate with it, save its river."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import nn

from .checks import names_keywords
from .engine.engine import Engine
from .engine.generate import Engines, Score, Stream, generate, score
from .engine.network import Network
from .engine.offload import weights_on_device
from .engine.sequence import GenerationOutput
from .errors import RiverError, memory_for
from .loading.calibrated import read_calibrated
from .loading.checkpoint import load_checkpoint
from .loading.config import ModelConfig, parse_device
from .loading.in_memory import checkpoint_in_memory, device_of, state_of
from .loading.offloaded import give_back_pages
from .loading.text import Text
from .loading.weights import ModelWeights
from .quant import exit_river
from .quant.imported.build import import_river
from .quant.imported.open import is_foreign
from .threads import in_own_thread

DEMO = Path(__file__).parent / "demo"


class Kept(NamedTuple):
    """What `load` has made of a model in memory."""

    model: "Model | None"  # None while it is made anew, and where that has failed
    options: dict  # other arguments of `load`
    state: list[tuple]  # see `state_of`


KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()  # by the models in memory, while they live


@names_keywords
@memory_for("the model and its river")
def load(
    path: str | Path | nn.Module | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    river: str | Path | None = None,
    resident_layers: int | None = None,
    calibrated: str | Path | None = None,
) -> "Model":
    """Loads a Hugging Face checkpoint directory and its exit river.

    Args:
        path: None loads the bundled demo model. A model of transformers in memory will do as well: its
            weights are used where they are, in its dtype on its device, and none is copied. What is returned
            has no tokenizer then, and is kept beside the model, for `custom_generate`.
        device: "cpu", "cuda", or "auto": a GPU if there is one and this build has kernels for it. A model in
            memory stays where it is.
        dtype: "bfloat16", "float16", on the CPU also "float32"; "auto" takes the checkpoint's.
        river: a directory that `Model.save_river` wrote for this checkpoint; None quantises the model now. Or
            the same model in 4 bits by others, whose weights become the river: a directory in the format AWQ,
            GPTQ or compressed-tensors, or a GGUF file.
        resident_layers: backbone layers that stay in the device's memory, 1 or more; those after them are
            offloaded. On a GPU their matrices lie in pinned memory of the host, and stream in where a token
            runs them; on the CPU they are pages of the mapped file, which the kernel may drop, and so need
            the stored dtype. The river stays. None offloads nothing. Results are the same.
        calibrated: a file that `river calibrate` wrote for this checkpoint and this river: what
            threshold="calibrated" and draft_tokens="calibrated" are.

    On the CPU a process may be forked after it has loaded a model, and its children generate. After it has
    generated itself, OpenMP's threads are missing in its children: there, call `torch.set_num_threads(1)`
    first, or generate in a new `threading.Thread`.
    """
    in_memory = isinstance(path, nn.Module)
    options = dict(dtype=dtype, river=river, resident_layers=resident_layers, calibrated=calibrated)
    state = state_of(path) if in_memory else None
    device = choose_device(device_of(path) if in_memory and device == "auto" else device)
    # with a GPU, forks are out of the question, and the current device and stream are the calling thread's
    load = in_own_thread(_load) if device.type == "cpu" else _load
    model = load(path, device, **options)
    if in_memory:
        KEPT[path] = Kept(model, options, state)
    return model


def _load(path, device: torch.device, dtype, river, resident_layers, calibrated) -> "Model":
    read = checkpoint_in_memory if isinstance(path, nn.Module) else load_checkpoint
    checkpoint = read(
        DEMO if path is None else path, dtype=dtype, device=device, resident_layers=resident_layers
    )
    config, weights, found = checkpoint.config, checkpoint.weights, None
    if calibrated is not None:
        found = read_calibrated(calibrated, config.num_hidden_layers)
        config = replace(config, calibrated=found)
        found.check_model(calibrated, checkpoint.fingerprint, weights.embed_tokens.dtype)
    if river is None:
        exit_layers = exit_river.build_river(config, weights_on_device(weights))
    elif is_foreign(river):
        exit_layers = import_river(river, config, weights_on_device(weights))
    else:
        exit_layers = exit_river.load_river(river, config, checkpoint.fingerprint, device)
    if found:
        has_head = exit_layers.lm_head is not None
        found.check_river(calibrated, exit_river.river_sha256(exit_layers), has_head)
    if config.resident_layers is not None and device.type == "cpu":
        give_back_pages(weights.layers[config.resident_layers :])  # read so far to check and to quantise them
    return Model(
        config=config,
        weights=weights,
        river=exit_layers,
        tokenizer=checkpoint.tokenizer,
        directory=checkpoint.directory,
        fingerprint=checkpoint.fingerprint,
    )


def choose_device(device: str | torch.device) -> torch.device:
    has_cuda_ops = torch._C._dispatch_has_kernel_for_dispatch_key("river::decoder_block", "CUDA")
    if device == "auto":
        return torch.device("cuda" if has_cuda_ops and torch.cuda.is_available() else "cpu")
    device = parse_device(device)
    if device.type == "cuda" and not has_cuda_ops:
        raise RiverError(f"device={str(device)!r}: this build has no CUDA kernels; accepted: 'cpu' or 'auto'")
    return device


class Model:
    """Backbone, exit river and tokenizer. `load` makes one from a checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        river: exit_river.ExitRiver,
        tokenizer: Tokenizer | None = None,
        directory: Path | None = None,
        fingerprint: str = "",
    ):
        self.config, self.weights, self.river = config, weights, river
        self.directory, self.fingerprint = directory, fingerprint
        self.network = Network(config, weights, river)
        self.text = Text(tokenizer, config, directory) if tokenizer else None
        self.tokenizer = tokenizer
        self._engines = Engines(self.network, self.text)

    def __repr__(self) -> str:
        config = self.config
        dtype = str(self.network.dtype).removeprefix("torch.")
        where = "" if self.directory is None else f", {str(self.directory)!r}"
        return (
            f"Model({config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"vocabulary {config.vocab_size}, {dtype} on {self.network.device}{where})"
        )

    @names_keywords
    @memory_for("the prompts and their new tokens")
    def generate(
        self,
        prompt: str | Sequence,
        *,
        max_new_tokens: int | Sequence[int] = 256,
        threshold: float | str | Sequence[float | str | Sequence[float]] = 0.5,
        min_layers: int | Sequence[int] = 1,
        batch_policy: str = "row",
        prefill: str = "full",
        mode: str = "river",
        draft_tokens: int | str = "auto",
        river_head: str = "model",
        deep_tokens: str = "stream",
        kv_strategy: str = "share",
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        return_logits: bool = False,
        exit_control: str = "auto",
        progress: bool = False,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Continues one prompt, or any number: up to 8 run together, the others wait.

        A prompt whose logits become NaN or infinite (float16 may overflow) gets no more tokens. Alone it
        raises RiverError; in a list, its output has finish_reason "error" and says why in `error`, and the
        others go on.

        Args:
            prompt: text, token ids (a list, a tensor or an array [n] or [1, n], or what a tokenizer of
                transformers returns), chat messages (a list of {"role": ..., "content": ...}), or a list of
                these; a list of prompts gives a list of outputs. Messages go through the checkpoint's chat
                template; `model.text.chat` gives their token ids, and takes the template's own variables.
            max_new_tokens: prompt and new tokens must fit the model's positions. For this and every other
                number but logprobs, a list gives each prompt its own.
            threshold: exit when the similarity is above it (strictly); inf never exits, -2 always. A list of
                num_hidden_layers numbers has one for each layer, after which it decides; in a list for
                several prompts, an item may be such a list. "calibrated": what `river calibrate` chose, if
                the model was loaded with its file.
            min_layers: backbone layers, 1 or more, that a token runs before it may exit.
            batch_policy: "row": each token exits on its own, and what a prompt gets does not depend on the
                others. "min", the paper's: the tokens of a step exit together, when every one of them may.
            prefill: the prompt's exit depth: "full", "depth:k", or by the rule on the lowest similarity of
                all prompt tokens ("min") or on that of the last one ("last").
            mode: "river"; "lossless": the river proposes tokens and the backbone checks them, so that all are
                the backbone's own; "full", the backbone alone (threshold inf); "full_w4", the river alone
                (depth 0). "lossless" gives the tokens of "full", bit for bit.
            draft_tokens: that the river proposes at a time in lossless mode, 1 to 7, as long as those of all
                running requests together are at most 8 less one each; "auto" goes by how many were right,
                and where the host has the control by how sure the river is, and quotes what the text said
                before where that promises more; "calibrated" is what `river calibrate` found to be the
                fastest.
            river_head: the head that tokens are drawn by in the modes "river" and "full_w4": the "model"'s,
                or the river's, "w4", which reads 0.28 of the bytes and is less exact. In mode "river" the
                first token is by the model's in any case. Lossless mode drafts by the river's.
            deep_tokens: what becomes of a token that wants to run an offloaded layer while it decodes.
                "stream": it does, with the results of a model of which nothing is offloaded. "exit": it
                leaves after the resident layers at the latest, whatever its similarity; the modes "full" and
                "lossless" and a threshold of inf do not allow that. Prompts are not concerned.
            kv_strategy: what a token that exits leaves in the cache for the remaining layers. "share", the
                river's: exit layers write to the places of the layers that they replace. The others are
                there to be compared with; with them a token goes from where it exits straight to the head.
                "mask": nothing, later tokens do not look there; "recompute": nothing, until a later token
                gets as deep; "propagate": K and V of the hidden state with which it exited; "monotone":
                nothing, and no later token of the sequence runs deeper. They need mode "river", prefill
                "full" and river_head "model"; exits are decided by the host.
            temperature: 0 is greedy.
            top_k: draw among the k likeliest tokens; 0 is all.
            top_p: draw among the likeliest tokens that together have this probability; 1 is all.
            min_p: draw among the tokens at least this times as likely as the likeliest one; 0 is all.
            seed: the same seed and prompt give the same tokens, whatever else is in the batch.
            stop: strings that end the text, and are not part of it. Special tokens are no text, but a
                string that is or contains the name of one ends it there.
            stop_tokens: ids that end the generation; None takes the checkpoint's end-of-sequence ids.
            logprobs: keep the log-probability of every new token, and of so many (0 to 20) of the likeliest,
                before temperature and filters.
            return_logits: keep the fp32 logits of every new token.
            exit_control: where exits are decided, which changes no result: "host", after reading similarities
                back, by CUDA graphs per part of the backbone and per exit depth; or on the "device", by
                graphs of two whole steps. In lossless mode the "host" looks at each draft, and a cycle on the
                "device" is one graph. A CPU has graphs of its own. "auto" is "device", which on a
                GPU is predicted to be the faster but not yet measured; on the CPU it is "host" in lossless
                mode, and where no token can exit, or all do at once. In the other modes the host decides in
                any case where a token may run a layer that streams to a GPU.
            progress: show on standard error how far a prompt is, if it takes long.
        """
        options = dict(
            max_new_tokens=max_new_tokens, threshold=threshold, min_layers=min_layers, prefill=prefill,
            mode=mode, draft_tokens=draft_tokens, river_head=river_head, deep_tokens=deep_tokens,
            kv_strategy=kv_strategy, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seed=seed, stop=stop, stop_tokens=stop_tokens, logprobs=logprobs, return_logits=return_logits,
        )  # fmt: skip
        return generate(self._engines, prompt, options, batch_policy, exit_control, progress)

    def stream(
        self,
        prompt: str | Sequence,
        *,
        batch_policy: str = "row",
        exit_control: str = "auto",
        progress: bool = False,
        **options,
    ) -> Stream:
        """`generate` for one prompt, with the same options, piece by piece: (text, token, exit_depth).

        The texts joined are the text that `generate` gives, and the stream's `output` is what it returns. A
        character that spans several tokens comes with its last one; what may be the beginning of a stop
        string is held back until it is certain. An error is raised in place of the next piece.
        """
        return Stream(self._engines, prompt, options, batch_policy, exit_control, progress)

    @names_keywords
    @memory_for("the cache of the engine's slots")
    def engine(
        self,
        *,
        slots: int = 8,
        max_len: int | None = None,
        batch_policy: str = "row",
        exit_control: str = "auto",
        reuse_prompts: bool = False,
    ) -> Engine:
        """An engine for requests that come and go: `submit`, `step`, `cancel`, or iterate over its events.

        Args:
            slots: requests that run at once, 1 to 8; the others wait.
            max_len: positions of a slot, which prompt and new tokens of a request must fit; None is the
                model's, up to 4,096. The memory, slots x max_len, is taken now.
            batch_policy, exit_control: as in `generate`.
            reuse_prompts: a prompt takes over what a slot holds of its beginning, an earlier turn of the same
                conversation say. By False that is only what changes no bit, for prompts with prefill="full":
                what the backbone wrote; on a GPU whole blocks of 512 tokens of other prompts. By True it is
                all, also what exit layers wrote; then tokens may depend on earlier requests.
        """
        return Engine(
            self.network,
            self.text,
            slots=slots,
            max_len=max_len,
            batch_policy=batch_policy,
            exit_control=exit_control,
            reuse_prompts=reuse_prompts,
        )

    @names_keywords
    @memory_for("the tokens and their logits")
    def score(
        self,
        tokens: Sequence[int],
        *,
        prompt_length: int,
        by: str = "steps",
        threshold: float | str | Sequence[float] = 0.5,
        min_layers: int = 1,
        prefill: str = "full",
        mode: str = "river",
        river_head: str = "model",
        kv_strategy: str = "share",
        deep_tokens: str = "stream",
    ) -> Score:
        """Logits and exit depths for given tokens, by the same prefill and decoding steps as `generate`.

        Row i of the logits is the prediction of tokens[prompt_length + i] from all tokens before it.

        Args:
            by: "steps": the first prompt_length tokens are prefilled, and each one after them is a decoding
                step, which may exit on its own. "prefill": all of them are prefilled together, so that only
                what `prefill` says may exit, and the mode "full_w4".
        """
        options = dict(
            threshold=threshold, min_layers=min_layers, prefill=prefill, mode=mode, river_head=river_head,
            kv_strategy=kv_strategy, deep_tokens=deep_tokens,
        )  # fmt: skip
        return score(self.network, tokens, prompt_length, by, options)

    def save_river(self, path: str | Path) -> None:
        """Writes the river, to be loaded with `load(..., river=path)`."""
        exit_river.save_river(path, self.river, self.config, self.fingerprint)
