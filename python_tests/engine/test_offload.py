"""Offloaded backbone layers: mapped on the CPU; streamed to a GPU, which is pretended here."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_checkpoint
from kv_oracle import assert_same, sequences
from oracle import oracle, same
from streams import Stream, Streams
from test_kv_strategies import OTHERS, run
from test_kv_strategies import some_requests as requests_of
from tiny_model import random_model, random_prompt

import river_ext
from river_ext.engine import engine as engine_module
from river_ext.engine import graph, offload, prefill
from river_ext.engine.decoder import EXIT_CONTROLS
from river_ext.engine.matmul import MatmulPrompt
from river_ext.engine.network import Layer
from river_ext.errors import RiverError
from river_ext.loading.offloaded import give_back_pages
from river_ext.model import Model

LAYERS, RESIDENT, POSITIONS, REQUESTS = 6, 2, 48, 16
CONTROLS = ("host", "device")


def whole_model():
    return random_model(num_hidden_layers=LAYERS)


def offloading_model(resident=RESIDENT):
    """The same with layers offloaded. A new one: an engine that was lent before holds what it has copied."""
    whole = whole_model()
    return Model(replace(whole.config, resident_layers=resident), whole.weights, whole.river)


# --- streamed to a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """Engines of a model with offloaded layers stream them, by streams that are watched."""
    monkeypatch.setattr(offload, "streams", lambda network: network.config.resident_layers is not None)
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 3)
    monkeypatch.setattr(prefill.OpsPrompt, "rows_at_a_time", 4)
    with Streams(monkeypatch) as streams:
        yield streams


@pytest.fixture
def copied(monkeypatch):
    """The layers that are copied to the device, in order."""
    copied, fill = [], offload.Buffer.fill

    def noted(buffer, index, *arguments):
        copied.append(index)
        fill(buffer, index, *arguments)

    monkeypatch.setattr(offload.Buffer, "fill", noted)
    return copied


def some_requests():
    generator = random.Random(8)
    for number in range(REQUESTS):
        mode = ["river", "lossless", "river", "full", "river", "full_w4"][number % 6]
        options = {
            "mode": mode,
            "max_new_tokens": generator.randint(2, 12),
            "threshold": generator.choice([0.5, 0.6, 0.7, 0.8, 2.0, math.inf]),
            "temperature": generator.choice([0.0, 1.2]),
            "seed": generator.randrange(9),
        }
        if mode == "river":
            options["prefill"] = generator.choice(["full", "min", "last", "depth:1", f"depth:{RESIDENT + 1}"])
            if options["threshold"] < math.inf:
                options["deep_tokens"] = generator.choice(["stream", "stream", "exit"])
        yield random_prompt(generator.randint(1, 11), number), options


def served(engine):
    """The outputs of requests that come while others decode."""
    requests, outputs, generator = list(some_requests()), {}, random.Random(5)
    while requests or engine.busy:
        for _ in range(generator.choice([0, 0, 1, 2])):
            if requests:
                prompt, options = requests.pop(0)
                engine.submit(prompt, id=REQUESTS - len(requests) - 1, **options)
        outputs |= {event.id: event.output for event in engine.step() if event.output}
    return outputs


@pytest.mark.parametrize(
    "control, resident", [("host", 1), ("host", RESIDENT), ("host", LAYERS - 1), ("device", RESIDENT)]
)
def test_requests_among_others(streams, copied, control, resident):
    """The results of a model of which nothing is offloaded; no copy and no layer gets in another's way."""
    model = offloading_model(resident)
    outputs = served(model.engine(slots=4, max_len=POSITIONS, exit_control=control))
    assert streams.races == []
    assert set(copied) == set(range(resident, LAYERS))
    for number, (prompt, options) in enumerate(some_requests()):
        options["mode"] = "full" if options["mode"] == "lossless" else options["mode"]
        assert same(outputs[number], oracle(model, prompt, **options)), number


@pytest.mark.parametrize("strategy", OTHERS)
def test_kv_strategies(streams, copied, strategy):
    """Whose steps run the backbone layer by layer, or parts of its layers."""
    slots = 1 if strategy == "propagate" else 3  # its writes to one slot are taken for writes to all of them
    requests = list(requests_of(strategy, 6, seed=30))
    outputs = run(offloading_model().engine(slots=slots, max_len=POSITIONS), requests, at_once=2)
    assert streams.races == []
    assert set(copied) == set(range(RESIDENT, LAYERS))
    for output, expected in zip(outputs, sequences(whole_model(), requests), strict=True):
        assert_same(output, expected)


def test_a_prompt_streams_each_layer_once(streams, copied, monkeypatch):
    """However many blocks of rows it has; and those after the first do not wait for the next layer."""
    waits, wait_stream = [], Stream.wait_stream

    def noted(stream, other):
        waits.append((stream.name, other.name))
        wait_stream(stream, other)

    monkeypatch.setattr(Stream, "wait_stream", noted)
    offloading_model().generate(random_prompt(13), max_new_tokens=1)
    assert copied == list(range(RESIDENT, LAYERS))
    assert waits.count(("the caller's stream", "a stream for copies")) == LAYERS - RESIDENT
    assert streams.races == []


def test_the_next_layer_is_copied_while_one_computes(streams, copied, monkeypatch):
    order, block = [], Layer.block

    def noted(layer, *arguments):
        order.append((layer.index, max(copied, default=None)))
        return block(layer, *arguments)

    monkeypatch.setattr(Layer, "block", noted)
    offloading_model().generate([1], mode="full", max_new_tokens=2)
    prompt = [(0, 2), (1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    assert order[:LAYERS] == prompt, "the last copy given out before a layer runs"
    assert copied == 2 * [2, 3, 4, 5], "by the prompt, and by the step after it"


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_what_fetches_is_not_captured(streams, monkeypatch, mode):
    """A graph would copy what had to be copied when it was captured."""
    captured = []

    class Noted(graph.Graph):
        def __init__(self, run, capture, pool):
            super().__init__(run, capture, pool)
            captured.append((run.func, *run.args[1:3], capture))

    monkeypatch.setattr(graph, "Graph", Noted)
    offloading_model().generate(random_prompt(4), mode=mode, threshold=0.95, max_new_tokens=40)
    if mode == "lossless":
        assert captured and not any(graph_of for *_, graph_of in captured)
        return
    depths = {depth: graph_of for part, _, depth, graph_of in captured if part is graph.backbone_part}
    assert set(depths) == set(range(1, LAYERS + 1))
    assert all(graph_of == (depth <= RESIDENT) for depth, graph_of in depths.items())
    assert all(graph_of for part, _, _, graph_of in captured if part is graph.tail_part)


def test_prompts_by_matrix_products(streams, monkeypatch):
    """As a GPU runs them; pieces of a prompt come between steps that fetch other layers."""
    monkeypatch.setattr(MatmulPrompt, "rows_at_a_time", 4)
    monkeypatch.setattr(prefill, "OpsPrompt", MatmulPrompt)
    prompts = [random_prompt(length, length) for length in (3, 14, 11)]
    whole, streamed = (
        model.generate(prompts, threshold=0.7, max_new_tokens=12)
        for model in (whole_model(), offloading_model())
    )
    assert [(out.tokens, out.similarities) for out in streamed] == [
        (out.tokens, out.similarities) for out in whole
    ]
    assert streams.races == []


@pytest.mark.parametrize("policy, reaches", [("depth:4", 4), ("depth:1", 0), ("depth:0", 0), ("min", 4)])
def test_a_shallow_prompt_streams_what_it_runs(streams, copied, policy, reaches):
    options = {"threshold": -2, "min_layers": 4}  # of the policy min
    offloading_model().generate(random_prompt(13), max_new_tokens=1, prefill=policy, **options)
    assert copied == list(range(RESIDENT, reaches))


def test_a_token_streams_what_it_runs(streams, copied):
    """Nothing on suspicion: where a token may leave, the next layer is not copied before it is wanted."""
    out = offloading_model().generate(
        random_prompt(3), max_new_tokens=9, threshold=-2, min_layers=RESIDENT + 2, prefill="depth:0"
    )
    assert set(out.exit_depths[1:]) == {RESIDENT + 2}
    assert copied == [RESIDENT, RESIDENT + 1], "the buffers hold what every token needs"


@pytest.mark.parametrize("control", CONTROLS)
def test_tokens_that_exit_stream_nothing(streams, copied, control):
    options = {"threshold": 0.9, "deep_tokens": "exit", "prefill": "depth:0", "max_new_tokens": 9}
    engine = offloading_model().engine(slots=1, max_len=POSITIONS, exit_control=control)
    engine.submit(random_prompt(3), **options)
    (output,) = [event.output for event in engine if event.output]
    assert copied == [] and streams.races == [] and max(output.exit_depths) == RESIDENT
    assert type(engine._steps.decoder) is EXIT_CONTROLS[control]


@pytest.mark.parametrize("mode, control", [("river", "host"), ("river", "device"), ("lossless", "host")])
def test_requests_that_are_dropped(streams, mode, control):
    """All are cleared while copies are under way, and an engine goes; others begin at once."""
    model, options = offloading_model(), {"mode": mode, "threshold": 2.0, "max_new_tokens": 20}
    engine = model.engine(slots=2, max_len=POSITIONS, exit_control=control)
    for steps in (1, 2, 5):
        for number in range(3):
            engine.submit(random_prompt(9, number), id=number, **options)
        for _ in range(steps):
            engine.step()
        engine.clear()
    engine.submit(random_prompt(9, 7), id="last", **options)
    (output,) = [event.output for event in engine if event.output]
    assert streams.races == []
    expected = {"threshold": math.inf, "max_new_tokens": 20}
    assert same(output, oracle(model, random_prompt(9, 7), **expected))


def test_given_tokens(streams, copied):
    whole, model, tokens = whole_model(), offloading_model(), random_prompt(20)
    for threshold in (0.6, math.inf):
        wanted = whole.score(tokens, prompt_length=7, threshold=threshold)
        got = model.score(tokens, prompt_length=7, threshold=threshold)
        assert got.exit_depths == wanted.exit_depths and torch.equal(got.logits, wanted.logits)
    assert streams.races == []
    copied.clear()
    model.score(tokens, prompt_length=19)
    assert copied == list(range(RESIDENT, LAYERS)), "by the prompt alone"


def test_an_interrupt_while_copies_are_given_out(streams, monkeypatch):
    """The buffer then holds no layer, and the next step copies it whole."""
    model, copy_ = offloading_model(), torch.Tensor.copy_
    engine, countdown = model.engine(slots=1, max_len=POSITIONS), itertools.count(-31)

    def interrupted(self, other, non_blocking=False):
        if non_blocking and self.shape == model.weights.layers[0].up_proj.shape and next(countdown) == 0:
            raise KeyboardInterrupt
        return copy_(self, other, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    engine.submit(random_prompt(5), mode="full", max_new_tokens=12)
    interrupts, outputs = 0, []
    while engine.busy:
        try:
            outputs += [event.output for event in engine.step() if event.output]
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert same(outputs[0], oracle(model, random_prompt(5), mode="full", max_new_tokens=12))


# --- deep tokens that exit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("threshold", [0.7, 2.0])
def test_exit_is_a_limit_of_depth(control, threshold):
    """Similarities are those of the layers that ran; the last may be below the threshold."""
    model, options = offloading_model(), {"threshold": threshold, "max_new_tokens": 20, "deep_tokens": "exit"}
    prompts = [random_prompt(length, length) for length in (1, 5, 9)]
    outputs = model.generate(prompts, exit_control=control, **options)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert same(output, oracle(model, prompt, **options))
        assert output.exit_depths[0] == LAYERS, "the prompt runs the whole backbone"
        decoded = list(zip(output.exit_depths[1:], output.similarities[1:], strict=True))
        assert max(depth for depth, _ in decoded) == RESIDENT
        assert all(len(similarities) == depth for depth, similarities in decoded)
        assert any(similarities[-1] <= threshold for _, similarities in decoded), "one was forced"


@pytest.mark.parametrize("control", CONTROLS)
def test_exit_together(control):
    """Under the policy min all of a batch leave at the limit, if all of them asked for it."""
    model = offloading_model()
    prompts = [random_prompt(length, length) for length in (2, 6)]
    outputs = model.generate(
        prompts, threshold=2.0, deep_tokens="exit", batch_policy="min", exit_control=control, max_new_tokens=9
    )
    assert {depth for output in outputs for depth in output.exit_depths[1:]} == {RESIDENT}


@pytest.mark.parametrize("policy", ["min", "last"])
def test_exit_leaves_the_prompt_alone(policy):
    model, options = offloading_model(), {"threshold": 0.999, "max_new_tokens": 1, "prefill": policy}
    depth = model.generate(random_prompt(9), **options).exit_depths
    assert depth[0] > RESIDENT
    assert model.generate(random_prompt(9), deep_tokens="exit", **options).exit_depths == depth


@pytest.mark.parametrize(
    "options, named",
    [
        ({"threshold": math.inf}, "threshold=inf"),
        ({"threshold": 1e39}, "threshold=inf"),
        ({"mode": "full"}, "mode='full'"),
        ({"mode": "lossless"}, "mode='lossless'"),
        ({"min_layers": RESIDENT + 1}, f"min_layers={RESIDENT + 1}"),
        ({"deep_tokens": "wait"}, "'stream', 'exit'"),
        ({"deep_tokens": None}, "deep_tokens=None"),
    ],
)
def test_what_exit_does_not_go_with(options, named):
    with pytest.raises(RiverError, match=named) as refused:
        offloading_model().generate([1], max_new_tokens=2, **{"deep_tokens": "exit"} | options)
    assert "\n" not in str(refused.value)


def test_exit_needs_offloaded_layers():
    model = whole_model()
    with pytest.raises(RiverError, match="resident_layers"):
        model.generate([1], deep_tokens="exit", max_new_tokens=2)
    assert model.generate([1], deep_tokens="stream", max_new_tokens=2).tokens


def test_exit_goes_with_the_pure_river():
    model = offloading_model()
    options = {"mode": "full_w4", "max_new_tokens": 5}
    assert model.generate([1], deep_tokens="exit", **options).tokens == model.generate([1], **options).tokens


# --- loaded on the CPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), num_hidden_layers=4, hidden_size=128)


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_a_loaded_model_gives_the_same(checkpoint, resident):
    """Over modes, thresholds and ways to run the prompt, for several prompts at once."""
    whole, offloaded = river_ext.load(checkpoint), river_ext.load(checkpoint, resident_layers=resident)
    prompts = [random_prompt(length, length) for length in (1, 4, 9)]
    settings = [
        *({"threshold": t, "prefill": p} for t in (-2, 0.9, math.inf) for p in ("full", "min", "depth:1")),
        {"mode": "full"},
        {"mode": "full_w4"},
        {"mode": "lossless", "temperature": 0.8, "seed": 3},
    ]
    for options in settings:
        options |= {"max_new_tokens": 8, "return_logits": True, "stop_tokens": ()}
        pairs = list(zip(*(model.generate(prompts, **options) for model in (whole, offloaded)), strict=True))
        for expected, got in pairs:
            assert got.tokens == expected.tokens and got.exit_depths == expected.exit_depths
            assert torch.equal(got.logits, expected.logits)
    full = offloaded.generate(prompts, **options | {"mode": "full"})
    assert [output.tokens for output in full] == [expected.tokens for expected, _ in pairs], "lossless"


def test_projections_that_are_stored_as_one(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, model_type="phi3", torch_dtype="float32")
    whole, offloaded = river_ext.load(directory), river_ext.load(directory, resident_layers=1)
    outputs = [model.generate([5, 7], threshold=0.9, max_new_tokens=9) for model in (whole, offloaded)]
    assert outputs[0].tokens == outputs[1].tokens
    with pytest.raises(RiverError, match=r"layers\.2\..*_proj\.weight is stored as F32"):
        river_ext.load(directory, dtype="bfloat16", resident_layers=2)


def in_memory(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's mapping that are in memory for this process."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no mapping holds the tensor")


def test_pages_of_offloaded_layers_are_given_back(tmp_path):
    changes = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 4096}
    directory = write_tiny_checkpoint(tmp_path, **changes)
    layer_bytes = 4 * 3 * 256 * 4096  # of gate, up and down
    sizes = {}
    for resident in (None, 1):
        model = river_ext.load(directory, resident_layers=resident)
        sizes[resident] = in_memory(model.weights.layers[3].gate_proj)
        whole = [tensor.clone() for tensor in vars(model.weights.layers[3]).values() if tensor is not None]
        del model
    assert sizes[None] - sizes[1] > 2.5 * layer_bytes
    again = river_ext.load(directory).weights.layers[3]
    assert all(map(torch.equal, whole, (tensor for tensor in vars(again).values() if tensor is not None)))


def test_memory_that_is_no_file_is_left_alone():
    layer = random_model(hidden_size=128, intermediate_size=1024).weights.layers[1]
    before = layer.gate_proj.clone()
    give_back_pages([layer])
    assert torch.equal(layer.gate_proj, before)


@pytest.mark.parametrize(
    "value, accepted",
    [
        (0, "from 1 to 4"),
        (-1, "from 1"),
        (5, "to 4"),
        (2.0, "an integer"),
        ("2", "an integer"),
        (True, "1 to 4"),
    ],
)
def test_resident_layers_that_are_refused(checkpoint, value, accepted):
    with pytest.raises(RiverError, match=rf"resident_layers={value!r}; accepted: .*{accepted}"):
        river_ext.load(checkpoint, resident_layers=value)


def test_a_copy_in_memory_is_refused(checkpoint, tmp_path):
    with pytest.raises(RiverError, match=r"layers\.2\..* F32.*bfloat16.*dtype='float32'"):
        river_ext.load(checkpoint, dtype="bfloat16", resident_layers=2)
    odd = write_tiny_checkpoint(tmp_path)
    data = (odd / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    header += b" " * ((-len(header)) % 8 + 1)
    (odd / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert river_ext.load(odd).generate([1], max_new_tokens=1).tokens
    with pytest.raises(RiverError, match="odd place"):
        river_ext.load(odd, resident_layers=2)
    river_ext.load(odd, resident_layers=3)  # all layers: none is offloaded


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_offloads(river_json):
    """With the same tokens, or with none that decodes deeper; the rows beside it take no harm."""
    common = ("generate", "--demo", "def f", "--max-new-tokens", "8", "--threshold", "0.98")
    whole, streamed = river_json(*common), river_json(*common, "--resident-layers", "4")
    assert whole["resident_layers"] is None and streamed["resident_layers"] == 4
    for name in ("tokens", "exit_depths", "similarities"):
        assert streamed["outputs"][0][name] == whole["outputs"][0][name]
    exits = river_json(*common, "--resident-layers", "4", "--deep-tokens", "exit", "--compare")
    assert max(exits["outputs"][0]["exit_depths"][1:]) == 4
    assert exits["rows"][0]["mean_exit_depth"] == 16, "of full depth"


def test_what_the_command_refuses(refused):
    demo = ("--demo", "--resident-layers")
    assert refused("generate", *demo, "0", "a").startswith("resident_layers=0; accepted")
    assert refused("eval", *demo, "17").startswith("resident_layers=17; accepted")
    assert "--resident-layers" in refused("generate", *demo, "few", "a")
    assert refused("generate", *demo, "4", "--deep-tokens", "wait", "a").startswith("deep_tokens='wait'")
    assert "resident_layers" in refused("generate", "--demo", "--deep-tokens", "exit", "a")
    assert "resident_layers" in refused("eval", "--demo", "--deep-tokens", "exit")
    exits = (*demo, "4", "--deep-tokens", "exit")
    assert "mode='lossless'" in refused("generate", *exits, "--mode", "lossless", "a")
    assert "threshold=inf" in refused("eval", *exits, "--thresholds", "0.5,inf")
