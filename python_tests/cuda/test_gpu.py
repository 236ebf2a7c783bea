"""What only a GPU can show: streams, captured graphs, memory that the host polls, the engine as a whole."""

import itertools

import gpu_ops
import pytest
import torch
from blocks import SHAPES, Block, assert_close, int32
from conftest import on_gpu_if
from cycles import Requests, differing
from drawing import MIXED, assert_same, drawing, make_logits
from tiny_model import demo_model, random_prompt

import river_ext
from river_ext import ops, reference
from river_ext.engine import graph, matmul
from river_ext.engine.exit_rule import BATCH_POLICIES
from river_ext.engine.slots import Slots

TEXTS = [
    "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:",
    "def add(x):",
    "Question: Tom",
]
SAMPLED = {"temperature": 0.8, "seed": 7}
FILTERED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 4}
PROMPTS = [random_prompt(n, n, vocab_size=300) for n in (5, 40, 1, 12)]


@pytest.fixture(autouse=True)
def required():
    on_gpu_if("cuda")


@pytest.fixture(scope="module")
def model():
    on_gpu_if("cuda")
    return river_ext.load(device="cuda")


def facts(outputs):
    return [
        (output.tokens, output.exit_depths, output.similarities, output.finish_reason) for output in outputs
    ]


def big_linear():
    g = torch.Generator(device="cuda").manual_seed(0)
    x, weight = (
        torch.randn(*size, generator=g, device="cuda").bfloat16() for size in ((3, 1024), (512, 1024))
    )
    return x, weight, reference.linear(x, weight)


def captured(run):
    """The graph of a call, on a stream of its own, and what the call gave."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        graph.capture_begin()
        out = run()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph, out


def test_ops_run_on_the_current_stream():
    """On any other stream they would not wait for what delays this one."""
    x, weight, expected = big_linear()
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = ops.linear(late, weight)
        side.synchronize()
    assert_close(out, expected, torch.bfloat16, "out")


def test_the_ends_of_a_cycle_run_on_the_current_stream():
    """There, what they read and write comes late."""
    ours, cpu = (Requests(2, 4, torch.bfloat16, seed=3) for _ in range(2))
    drawn = cpu.tokens(2), cpu.tokens(8)
    tensors = [name for name, value in vars(ours).items() if isinstance(value, torch.Tensor)]
    for name in tensors:
        here = getattr(ours, name)
        setattr(ours, name, here.pin_memory() if name == "records" else here.cuda())
    there = [tokens.cuda() for tokens in drawn]
    late, side = [torch.zeros_like(tokens) for tokens in there], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tokens, values in zip(late, there, strict=True):
            tokens.copy_(values)
        ours.draft_advance(ops, late[0], 0).accept(ops, late[1])
        side.synchronize()
    for name in tensors:
        setattr(ours, name, getattr(ours, name).cpu())
    cpu.draft_advance(ops, drawn[0], 0).accept(ops, drawn[1])
    assert differing(ours, cpu) == []


def test_an_op_is_deterministic():
    block = Block(SHAPES["gqa"], torch.bfloat16)
    weights = [value.cuda() for value in block.dense.values()]
    x = block.random(8, block.shape.hidden_size).cuda()
    first = ops.linear(x, weights[0])
    assert all(torch.equal(ops.linear(x, weights[0]), first) for _ in range(50))


def test_an_op_in_a_graph():
    x, weight, _ = big_linear()
    graph, out = captured(lambda: ops.linear(x, weight))
    for sign in (1, -1, 1):
        x.copy_(x.abs() * sign)
        expected = reference.linear(x, weight)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, expected, torch.bfloat16, "out")


def test_filters_in_a_graph():
    """They are values: one graph serves rows with any."""
    vocab, rows = 3001, 4
    there = {name: value.cuda() for name, value in drawing(make_logits("random", vocab, rows)).items()}
    graph, out = captured(lambda: ops.sample(**there))
    mixed = {name: values[2 : 2 + rows] for name, values in MIXED.items()}
    for kind, options in (
        ("random", mixed),
        ("flat", {"top_k": 300, "top_p": 0.9}),
        ("tied", {"min_p": 0.3}),
    ):
        arguments = drawing(make_logits(kind, vocab, rows), **options)
        for name, value in arguments.items():
            there[name].copy_(value)
        for part in out:
            part.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out, ops.sample(**there))
        assert torch.equal(out[0].cpu(), reference.sample(**arguments)[0])


def test_a_large_head_in_4_bits():
    """More strips than a GPU has blocks; the last one is padded."""
    vocab, size, g = 20_001, 1024, torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (vocab, size), generator=g, dtype=torch.uint8)
    scale, zero = (torch.rand(vocab, size // ops.TILE_COLS, generator=g).half() + part for part in (0.5, 7))
    head = ops.pack_w4(q, scale, zero), vocab, 1e-5
    hidden, norm = (torch.randn(n, size, generator=g).bfloat16() for n in (5, 1))
    tokens, logits = gpu_ops.lm_head_w4(hidden, norm[0], *head)
    _, expected = reference.lm_head_w4(hidden, norm[0], *head)
    assert_close(logits.bfloat16(), expected.bfloat16(), torch.bfloat16, "logits")
    assert torch.equal(tokens, logits.argmax(1))


def test_capture_without_a_workspace_is_refused():
    """It would be zeroed at replay, not now. A split weight of this size needs more than those before."""
    x = torch.randn(8, 16384, device="cuda").bfloat16()
    weight = torch.randn(2048, 16384, device="cuda").bfloat16()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="run the op once on this stream"):
            ops.linear(x, weight)
        graph.capture_end()


@pytest.mark.parametrize("overlap", ["none", "launch", "prefetch"])
def test_overlap_does_not_change_a_bit(overlap):
    block = Block(SHAPES["odd sizes"], torch.bfloat16)
    hidden, caches = block.random(4, block.shape.hidden_size), block.caches()
    place = int32([0, 3, -1, 5]), int32([4, 9, 0, 47])
    results = []
    for setting in ("prefetch", overlap):
        before = ops._C.set_overlap(setting)
        try:
            own = [cache.clone() for cache in caches]
            results.append([*block.run(gpu_ops, "decoder_block", hidden, own, *place), *own])
        finally:
            ops._C.set_overlap(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_that_the_host_polls_must_be_pinned():
    rows, layers, size = 1, 2, 64
    there = {"device": "cuda"}
    hidden = torch.zeros(rows, size, dtype=torch.bfloat16, **there)
    ints = [torch.zeros(rows, dtype=torch.int32, **there) for _ in range(4)]
    arguments = [
        hidden, hidden, torch.zeros(rows, dtype=torch.int64, **there), hidden,
        torch.zeros(rows, 0, dtype=torch.int64, **there), hidden.clone(), *ints,
        torch.zeros(layers, rows, dtype=torch.int32, **there), torch.zeros(layers, rows, **there),
        torch.zeros(1, dtype=torch.int32, **there),
    ]  # fmt: skip
    records = torch.zeros(2, 1 + 2 * rows + layers * rows, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="pinned"):
        ops.advance(*arguments, records)
    *arguments, records = Requests(dtype=torch.bfloat16).accepting(torch.tensor([3, 4])).values()
    with pytest.raises(RuntimeError, match="pinned"):
        ops.accept(*(a.cuda() for a in arguments), records)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.5}, {"threshold": 0.98}, {"mode": "full"}, {"mode": "full_w4"},
        {"threshold": 0.9, "temperature": 0.7, "seed": 3}, {"threshold": 0.9, "min_layers": 3, "stop": "2"},
        {"threshold": 0.9, **FILTERED},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("policy", BATCH_POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_steps_give_what_eager_ones_give(model, monkeypatch, options, batch, policy):
    """From a stream that is not the default one as well."""
    prompts, options = TEXTS[:batch], {"max_new_tokens": 40, "batch_policy": policy, **options}
    with monkeypatch.context() as patch:
        patch.setattr(graph, "Graph", eager)
        model._engines.idle.clear()
        expected = facts(model.generate(prompts, exit_control="host", **options))
        model._engines.idle.clear()
    for control in ("host", "device") * 2:
        assert facts(model.generate(prompts, exit_control=control, **options)) == expected
        with torch.cuda.stream(torch.cuda.Stream()):
            assert facts(model.generate(prompts, exit_control=control, **options)) == expected
        logits = model.generate(prompts, exit_control=control, return_logits=True, **options)
        assert facts(logits) == expected
        for output in logits:
            assert len(output.logits) == len(output.tokens)
            if not options.get("temperature"):
                assert output.logits.argmax(-1).tolist() == output.tokens, "of the step, not of a later one"


def eager(run, captured, pool, new=graph.Graph):
    """In place of graph.Graph: what would be captured runs each time, op by op."""
    return new(run, captured=False, pool=pool)


def test_the_gpu_agrees_with_the_cpu(model):
    """bf16 sums in another order: the logits agree to rounding, so do the scores of a given text."""
    tokens = demo_model().generate(PROMPTS[1], threshold=float("inf"), max_new_tokens=24).tokens
    for mode in ("full", "full_w4"):
        scores = [
            m.score(PROMPTS[1] + tokens, prompt_length=len(PROMPTS[1]), mode=mode)
            for m in (model, demo_model())
        ]
        ours, theirs = (score.logits.float().cpu().log_softmax(-1) for score in scores)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1)
        assert divergence.max() < 0.02, mode


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("threshold", [float("inf"), 0.98, 0.9, [0.5, float("inf"), -2, 0.95]], ids=str)
def test_rows_do_not_see_each_other(model, threshold, control):
    """Each leaves on its own: a batch gives what its prompts give alone."""
    options = {"max_new_tokens": 16, "exit_control": control}
    together = facts(model.generate(PROMPTS, threshold=threshold, **options))
    thresholds = threshold if isinstance(threshold, list) else [threshold] * len(PROMPTS)
    alone = [
        model.generate(prompt, threshold=own, **options)
        for prompt, own in zip(PROMPTS, thresholds, strict=True)
    ]
    assert together == facts(alone)


@pytest.mark.parametrize("options", [{}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize(
    "requests, drafts", [(1, (1, 2, 3, 4, 5, 6, 7, "auto")), (2, (1, 3, "auto")), (4, (1, "auto"))]
)
def test_lossless_is_full(model, requests, drafts, options):
    """Tokens, similarities and logits are the same bits, whatever is drafted, and some drafts are right."""
    prompts = [*TEXTS, PROMPTS[1]][:requests]
    options = {"max_new_tokens": 40, "return_logits": True, **options}
    expected = model.generate(prompts, mode="full", **options)
    for draft_tokens in drafts:
        outputs = model.generate(prompts, mode="lossless", draft_tokens=draft_tokens, **options)
        assert facts(outputs) == facts(expected), draft_tokens
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(outputs, expected, strict=True))
        assert sum(output.stats.accepted_drafts for output in outputs) > 0, draft_tokens
    options["return_logits"] = False
    for control in ("device", "host"):
        plain = model.generate(prompts, mode="lossless", exit_control=control, **options)
        assert facts(plain) == facts(expected), "without logits, heads and filters are others"


@pytest.mark.parametrize("control", ["host", "device"])
def test_what_a_text_says_again_is_quoted(model, control):
    prompts, options = ["7, 3, 9, 1, 4, 8, 2, 6, " * 3, TEXTS[0]], {"max_new_tokens": 40, "stop_tokens": ()}
    outputs = model.generate(prompts, mode="lossless", exit_control=control, **options)
    assert facts(outputs) == facts(model.generate(prompts, mode="full", **options))
    assert outputs[0].stats.quotes > 0


@pytest.mark.parametrize("control", ["host", "device"])
def test_offloaded_layers(model, control):
    """Streamed in they change nothing, whoever runs beside, and steps without them stay the device's."""
    offloaded = river_ext.load(device="cuda", resident_layers=3)
    assert offloaded.weights.layers[3].q_proj.is_pinned() and offloaded.weights.layers[2].q_proj.is_cuda
    for options in ({"threshold": 0.9}, {"threshold": [0.5, float("inf"), -2, 0.95]}, {"mode": "full"}):
        options = {"max_new_tokens": 16, "exit_control": control, **options}
        assert facts(offloaded.generate(PROMPTS, **options)) == facts(model.generate(PROMPTS, **options))
    lossless = offloaded.generate(PROMPTS, mode="lossless", max_new_tokens=16)
    assert facts(lossless) == facts(model.generate(PROMPTS, mode="full", max_new_tokens=16))
    options = {"threshold": 0.95, "deep_tokens": "exit", "max_new_tokens": 16, "exit_control": control}
    depths = [depth for output in offloaded.generate(PROMPTS, **options) for depth in output.exit_depths[1:]]
    assert max(depths) == 3


MODES = [
    {"threshold": 0.9}, {"mode": "lossless", "draft_tokens": 1}, {"mode": "full_w4"},
    {"mode": "full", **FILTERED}, {"mode": "lossless", **SAMPLED},
    {"threshold": -2, "min_layers": 3, "river_head": "w4", "logprobs": 0},
    {"threshold": 0.98, **FILTERED}, {"mode": "lossless", "max_new_tokens": 5, **FILTERED},
    {"threshold": 0.95, "prefill": "last", "logprobs": 2},
]  # fmt: skip


@pytest.mark.parametrize("control", ["host", "device"])
def test_requests_among_others(model, control):
    """They come and go, in modes of their own: each gets what it gets alone."""
    modes = itertools.islice(itertools.cycle(MODES), 4 * len(PROMPTS))
    prompts = [*TEXTS, *PROMPTS] * 3
    requests = [
        (prompt, {"max_new_tokens": 24, **mode}) for prompt, mode in zip(prompts, modes, strict=False)
    ]
    engine = model.engine(slots=5, max_len=128, exit_control=control)
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs = {event.id: event.output for event in engine if event.output}
    alone = [model.generate(prompt, exit_control="host", **options) for prompt, options in requests]
    together = [outputs[number] for number in range(len(requests))]
    assert facts(together) == facts(alone)
    assert [output.logprobs for output in together] == [output.logprobs for output in alone]
    assert sum(output.stats.accepted_drafts for output in together) > 0


def test_prompts_that_begin_alike(model, monkeypatch):
    """They take over whole blocks of products, whose bits are those of a prompt from the start."""
    monkeypatch.setattr(matmul.MatmulPrompt, "rows_at_a_time", 64)
    shared, starts, fill = random_prompt(200, 1, vocab_size=300), [], Slots.fill
    monkeypatch.setattr(
        Slots, "fill", lambda self, one, cache: (fill(self, one, cache), starts.append(one.start))
    )
    rest = random_prompt(70, 2, vocab_size=300)
    prompts = [shared, shared[:150] + rest, shared + rest, shared[:64] + rest]

    def outputs(prompts):
        with model.engine(slots=2, max_len=300) as engine:
            for number, prompt in enumerate(prompts):
                engine.submit(prompt, id=number, mode="full", max_new_tokens=12, return_logits=True)
            found = {event.id: event.output for event in engine if event.output}
        return [found[number] for number in range(len(prompts))]

    alone = [outputs([prompt])[0] for prompt in prompts]
    assert starts == [0] * 4
    together = outputs(prompts)
    assert starts[5:] == [128, 192, 64]
    assert facts(together) == facts(alone)
    assert all(one.logits.equal(other.logits) for one, other in zip(together, alone, strict=True))
