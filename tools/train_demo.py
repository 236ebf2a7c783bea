"""Train, and measure, the bundled demo model: a small Llama on generated word problems and functions.

    python tools/train_demo.py --out demo                       # train, or resume from demo/trainer.pt
    python tools/train_demo.py --out demo --steps 2000          # resume, with another end
    python tools/train_demo.py --out river_ext/demo --evaluate  # full depth against full W4

The learning rate warms up, stays, and falls linearly to zero over the last `--decay` steps, so that a run may
be ended at any time by resuming it with a smaller `--steps`. The text of a step depends only on the seed and
the step's number.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "river_ext")]  # `demo_tasks` alone comes without the extension
from demo_tasks import generator  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.03,
    "dtype": "bfloat16",
}


# --- model ---


def rope_table(cfg, device):
    """(cos, sin), each [max positions, head_dim]."""
    dim, theta = cfg["head_dim"], cfg["rope_parameters"]["rope_theta"]
    freq = theta ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.outer(torch.arange(cfg["max_position_embeddings"], device=device).float(), freq).repeat(
        1, 2
    )
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding of x [batch, heads, length, dim] with cos and sin [..., length, dim]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Norm(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(cfg["hidden_size"])), cfg["rms_norm_eps"]

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, self.dim = cfg["hidden_size"], cfg["head_dim"]
        self.heads, self.kv_heads = cfg["num_attention_heads"], cfg["num_key_value_heads"]
        self.q_proj = nn.Linear(d, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, d, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        """x [batch, length, hidden]; additive `mask` [.., length, keys]; `cache`: list of earlier k and v."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v
        # the query heads of one KV head as one long matrix: faster on CPU than scaled_dot_product_attention
        shape = (batch, self.kv_heads, self.heads // self.kv_heads, length)
        scores = q.reshape(batch, self.kv_heads, -1, self.dim) @ (k * self.dim**-0.5).transpose(2, 3)
        p = torch.softmax(scores.view(*shape, -1) + mask, -1, dtype=torch.float32).to(v.dtype)
        y = p.view(batch, self.kv_heads, -1, p.shape[-1]) @ v
        return self.o_proj(y.view(batch, self.heads, length, -1).transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, inner = cfg["hidden_size"], cfg["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(cfg), Attention(cfg)
        self.post_attention_layernorm, self.mlp = Norm(cfg), Mlp(cfg)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["hidden_size"])
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["num_hidden_layers"]))
        self.norm = Norm(cfg)


class Llama(nn.Module):
    """Llama with a tied head; parameter names as in Hugging Face checkpoints."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.model = cfg, Body(cfg)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * cfg["num_hidden_layers"]) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=cfg["initializer_range"] * scale)
        for name, table in zip(("cos", "sin"), rope_table(cfg, None), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens, positions=None, mask=None, caches=None):
        """Logits [batch, length, vocabulary] of tokens [batch, length]; without `positions` they start at 0.

        `mask` [batch, length, keys] is True where a query may look; without it attention is causal.
        """
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if positions is None:
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if mask is None:
            length = tokens.shape[1]
            mask = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -1e4)[:, None, None]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, None if caches is None else caches[i])
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# --- text ---


def train_tokenizer(seed, vocab_size):
    """Byte-level BPE with single digits, trained on generated text."""
    rng = random.Random(f"tokenizer {seed}")
    items = [generator.train_item(rng) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((item.prompt + item.completion for item in items), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def encode(tokenizer, text):
    """Without the document separator that starts a prompt of the finished model."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def batch_of(step, tokenizer, args, rank=0):
    """Tokens [rows, length + 1] and loss weights [rows, length] of one step, or the part of one process.

    A row holds whole documents, the last one cut; the weights of all rows sum to 1.
    """
    rng = random.Random(f"train {args.seed} {step}")
    tokens = torch.zeros(args.rows, args.length + 1, dtype=torch.long)
    weights = torch.zeros(args.rows, args.length + 1)
    for row in range(args.rows):
        ids, weight = ([0], [0.0]) if rng.random() < 0.5 else ([], [])
        while len(ids) < args.length + 1:
            item = generator.train_item(rng, args.functions)
            prompt = encode(tokenizer, item.prompt)
            completion = encode(tokenizer, item.completion) + [0]
            ids += prompt + completion
            weight += [args.prompt_weight] * len(prompt) + [1.0] * len(completion)
        tokens[row] = torch.tensor(ids[: args.length + 1])
        weights[row] = torch.tensor(weight[: args.length + 1])
    part = slice(rank * args.rows // args.processes, (rank + 1) * args.rows // args.processes)
    weights = weights[:, 1:] / weights[:, 1:].sum()
    return tokens[part].to(args.device), weights[part].to(args.device)


# --- greedy decoding and scores ---


@torch.no_grad()
def greedy(model, prompts, limit=120, batch=100):
    """Greedy continuations (lists of ids, without the final 0) of prompts (lists of ids), in batches."""
    device, results = model.cos.device, [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in (order[i : i + batch] for i in range(0, len(order), batch)):
        longest = max(len(prompts[i]) for i in chunk)
        pad = torch.tensor([longest - len(prompts[i]) for i in chunk], device=device)
        tokens = torch.tensor([[1] * (longest - len(prompts[i])) + prompts[i] for i in chunk], device=device)
        caches, written = [[] for _ in model.model.layers], []
        done = torch.zeros(len(chunk), dtype=torch.bool, device=device)
        for end in range(longest, longest + limit):
            query = torch.arange(end - tokens.shape[1], end, device=device)[None, :, None]
            key = torch.arange(end, device=device)[None, None, :]
            # a padded query sees itself only, so that its softmax is defined
            mask = ((key <= query) & (key >= pad[:, None, None])) | (key == query)
            positions = (query[:, :, 0] - pad[:, None]).clamp(min=0)
            tokens = model(tokens, positions, mask, caches)[:, -1].argmax(-1, keepdim=True)
            written.append(tokens)
            done |= tokens[:, 0] == 0
            if done.all():
                break
        for i, ids in zip(chunk, torch.cat(written, 1).tolist(), strict=True):
            results[i] = ids[: ids.index(0)] if 0 in ids else ids
    return results


def score(model, tokenizer, problems, functions):
    """(problems right, functions right) as lists of bool, and all continuations as lists of ids."""
    items = problems + functions
    written = greedy(model, [encode(tokenizer, item.prompt) for item in items])
    texts = [tokenizer.decode(ids) for ids in written]
    right = [generator.score_problem(t, i) for t, i in zip(texts, problems, strict=False)]
    right_f = [generator.score_function(t, i) for t, i in zip(texts[len(problems) :], functions, strict=True)]
    return right, right_f, written


def quantized(model, group_size=64):
    """A copy of `model` with the projections of all layers through 4-bit HQQ; the rest as it is."""
    from river_ext import quantize  # training does without the built extension

    copy = Llama(model.cfg).to(model.cos.device)
    copy.load_state_dict(model.state_dict())
    for module in copy.model.layers.modules():
        if isinstance(module, nn.Linear):
            q, scale, zero = (t.float() for t in quantize(module.weight.data, group_size))
            grouped = q.unflatten(1, (-1, group_size))  # [out, groups, group size]
            module.weight.data = ((grouped - zero[..., None]) * scale[..., None]).flatten(1)
    return copy.eval()


def load(folder, device="cpu"):
    """(model in fp32, tokenizer) of a Hugging Face directory with a tied head."""
    folder = Path(folder)
    model = Llama(json.loads((folder / "config.json").read_text())).to(device)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def evaluate(args):
    """Print the scores of the model in `args.out` at full depth and with 4-bit weights."""
    model, tokenizer = load(args.out, args.device)
    problems = generator.held_out_problems(args.problems, args.eval_seed)
    functions = generator.held_out_functions(args.problems // 3, args.eval_seed)
    start, reference = time.time(), None
    for name, variant in (("full depth", model), ("full W4", quantized(model))):
        *rights, written = score(variant, tokenizer, problems, functions)
        reference = reference or written
        differs = [a != b for a, b in zip(reference, written, strict=True)]
        parts = differs[: len(problems)], differs[len(problems) :]
        for kind, right, differ in zip(("problems", "functions"), rights, parts, strict=True):
            p, n = sum(right) / len(right), len(right)
            error, other = math.sqrt(p * (1 - p) / n), sum(differ) / n
            line = f"{name:10} {kind:9} {p:7.2%} right (n = {n}, s.e. {error:.2%})"
            print(f"{line}, {other:.2%} of sequences differ from full depth")
    print(f"{time.time() - start:.0f} s, {args.device}, {torch.get_num_threads()} threads")


def transplant(model, tokenizer, folder):
    """Start from the weights of another directory; a token it lacks gets the mean of its pieces."""
    other, old = load(folder, model.cos.device)
    weights = other.state_dict()
    rows, vocab = weights["model.embed_tokens.weight"], old.get_vocab()
    pieces = [
        [vocab[token]] if token in vocab else encode(old, tokenizer.decode([i]))
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    ]
    weights["model.embed_tokens.weight"] = torch.stack([rows[ids].mean(0) for ids in pieces])
    model.load_state_dict(weights)


# --- training ---


def optimizers(model, args):
    """[Muon for the matrices of the layers, AdamW for the rest], learning rates set at every step."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adamw = {"lr": 0.0, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if args.optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": args.weight_decay}
        return [torch.optim.AdamW([decayed, {"params": rest}], **adamw)]
    muon = torch.optim.Muon(
        matrices, lr=0.0, momentum=0.95, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, **adamw)]


def rate(step, args):
    """Share of the peak learning rate at `step`: warm-up, constant, then linear to zero."""
    return max(0.0, min(1.0, (step + 1) / args.warmup, (args.steps - step) / args.decay))


@torch.no_grad()
def add_outliers(model, octaves, share=16, seed=0):
    """Give one input channel in `share` of every layer's projections `octaves` larger weights, in place.

    The norm before them gets the inverse, a power of two, so that the model computes bit for bit the same.
    Groups with such channels lose more to 4 bits, as in large models, where channels differ by nature.
    """
    rng = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        for norm, after in (
            (layer.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
            (layer.post_attention_layernorm, (m.gate_proj, m.up_proj)),
        ):
            width = len(norm.weight)
            channels = torch.randperm(width, generator=rng)[: width // share].to(norm.weight.device)
            norm.weight[channels] *= 2.0**-octaves
            for projection in after:
                projection.weight[:, channels] *= 2.0**octaves


def replace(path, write):
    """Call `write(temporary path)` and rename the result to `path`."""
    temporary = path.with_name(path.name + ".new")
    write(temporary)
    os.replace(temporary, path)


def export(model, args):
    """Write weights and config.json of the Hugging Face directory; safe to stop at any time."""
    add_outliers(model, args.outliers)
    weights = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    replace(args.out / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    replace(args.out / "config.json", lambda path: path.write_text(json.dumps(model.cfg, indent=2) + "\n"))


def sum_gradients(model, loss):
    """Sum the gradients over all processes in place; returns the sum of their losses."""
    parameters = list(model.parameters())
    flat = torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat[1:].split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
    return flat[0]


def train(rank, args):
    """Train to `args.steps`, resuming from `trainer.pt` in `args.out` if there is one; rank 0 writes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.processes > 1:
        meeting = f"file://{args.meeting}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    tokenizer_file = args.out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(args.seed, CONFIG["vocab_size"])
        if rank == 0:
            replace(tokenizer_file, lambda path: tokenizer.save(str(path)))
    model = Llama(CONFIG).to(args.device)
    opts, first, seconds = optimizers(model, args), 0, 0.0
    if args.init:
        transplant(model, tokenizer, args.init)
    state_file = args.out / "trainer.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    if args.export:
        return None if rank else export(model, args)
    forward = torch.compile(model) if args.compile else model
    problems = generator.held_out_problems(100, seed=1)
    functions = generator.held_out_functions(50, seed=1)

    def save(step):
        state = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
        state |= {"step": step, "seconds": seconds}
        replace(state_file, lambda path: torch.save(state, path))

    def report(step):
        right, right_f, _ = score(model, tokenizer, problems, functions)
        scores = f"problems {sum(right)}/{len(right)}, functions {sum(right_f)}/{len(right_f)}"
        print(f"step {step}: held-out {scores}", flush=True)

    last_save, losses = time.time(), []
    for step in range(first, args.steps):
        start = time.time()
        for opt, peak in zip(opts, (args.lr, args.lr_rest), strict=False):
            for group in opt.param_groups:
                group["lr"] = peak * rate(step, args)
        tokens, weights = batch_of(step, tokenizer, args, rank)
        with torch.autocast(args.device, torch.bfloat16):
            logits = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (loss * weights.flatten()).sum()
        loss.backward()
        if args.processes > 1:
            loss = sum_gradients(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds += time.time() - start
        if rank:
            continue
        if (step + 1) % args.log_every == 0:
            seen = (step + 1) * args.rows * args.length / 1e6
            state = f"loss {sum(losses) / len(losses):.4f} rate {rate(step, args):.3f}"
            print(
                f"step {step + 1}/{args.steps} {state} {seen:.2f} M tokens {seconds / 60:.1f} min", flush=True
            )
            losses = []
        if time.time() - last_save > args.save_seconds:
            save(step + 1)
            last_save = time.time()
        if (step + 1) % args.eval_every == 0:
            report(step + 1)
    if rank:
        return
    save(args.steps)
    export(model, args)
    report(args.steps)


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write, or to evaluate")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps the default")
    p.add_argument("--processes", type=int, default=1, help="data-parallel processes on CPU")
    p.add_argument("--init", type=Path, help="directory with weights to start from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--decay", type=int, default=1000, help="the last steps, where the rate falls to zero")
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--rows", type=int, default=32)
    p.add_argument("--length", type=int, default=192)
    p.add_argument("--functions", type=float, default=0.2, help="share of documents that are functions")
    p.add_argument("--prompt-weight", type=float, default=0.0, help="weight of the loss on prompt tokens")
    p.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    p.add_argument("--lr", type=float, default=3e-3, help="peak rate of the layers' matrices")
    p.add_argument("--lr-rest", type=float, default=2e-3, help="peak rate of embedding and norms (with muon)")
    p.add_argument("--weight-decay", type=float, default=0.02)
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--log-every", type=int, default=25)
    p.add_argument("--eval-every", type=int, default=200)
    p.add_argument("--save-seconds", type=float, default=90)
    p.add_argument("--export", action="store_true", help="write the model as in trainer.pt, without training")
    p.add_argument("--outliers", type=int, default=0, help="when writing the model: see add_outliers")
    p.add_argument("--evaluate", action="store_true", help="score the model in --out at full depth and in W4")
    p.add_argument("--problems", type=int, default=300, help="with --evaluate; a third as many functions")
    p.add_argument("--eval-seed", type=int, default=0)
    return p.parse_args()


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.processes == 1:
            train(0, args)
        else:
            with tempfile.TemporaryDirectory() as folder:
                args.meeting = Path(folder) / "meeting"
                torch.multiprocessing.start_processes(train, (args,), args.processes, start_method="fork")


if __name__ == "__main__":
    main()
