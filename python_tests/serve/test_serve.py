"""The API as clients see it: OpenAI's own, and HTTP."""

import json

import pytest
from serving import LONG, QUESTION, Server, events_of, shared_server, text_of
from tiny_model import demo_model

PROMPT = f"Question: {QUESTION}\nAnswer:"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def river(**fields) -> dict:
    """Fields that OpenAI's API lacks, for its client."""
    return {"extra_body": fields}


# --- what is generated ----------------------------------------------------------------------------------

WAYS = [
    ({"temperature": 0}, {}),
    ({"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"top_k": 40, "min_p": 0.01}),
    ({"temperature": 0}, {"mode": "full"}),
    ({"temperature": 0}, {"mode": "lossless", "draft_tokens": 3}),
    ({"temperature": 0.7, "seed": -5}, {"mode": "river", "threshold": 0.9, "min_layers": 2}),
    ({"temperature": 0}, {"mode": "river", "threshold": [1, 1, 0.98, *[0.9] * 13]}),
    ({"temperature": 0, "stop": ["="]}, {}),
    ({"temperature": 0, "stop": "33"}, {}),
]


@pytest.mark.parametrize("options, extra", WAYS)
def test_completions_are_what_generate_gives(server, options, extra):
    """Whole and as a stream, in text, ends and counts."""
    asked = {"model": server.name, "prompt": PROMPT, "max_tokens": 24, **options, **river(**extra)}
    whole = server.openai.completions.create(**asked)
    chunks = list(
        server.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    expected = demo_model().generate(PROMPT, max_new_tokens=24, **{"mode": "lossless"} | options | extra)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert whole.usage.completion_tokens == len(expected.tokens)
    assert whole.usage.prompt_tokens == expected.stats.prompt_tokens
    assert whole.river["mean_exit_depth"] == expected.stats.mean_exit_depth
    *parts, usage = chunks
    assert "".join(part.choices[0].text for part in parts) == expected.text
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [expected.finish_reason]
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id != whole.id


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_chat_is_what_generate_gives(server, limit):
    asked = {"model": server.name, "messages": MESSAGES, limit: 24, "temperature": 0}
    whole = server.openai.chat.completions.create(**asked)
    expected = demo_model().generate(PROMPT, max_new_tokens=24, mode="lossless")
    (choice,) = whole.choices
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert (choice.finish_reason, whole.object) == (expected.finish_reason, "chat.completion")
    chunks = list(server.openai.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_chat_goes_on_as_long_as_there_is_room(server):
    """Where no limit is given; and developers say what systems said."""
    said = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    # at this seed the text ends by itself, far beyond what completions get where they say nothing
    asked = {"messages": said, "temperature": 3, "seed": 4}
    output = server.post("chat/completions", **asked).json()
    expected = demo_model().generate(
        "x\nQuestion: y\nAnswer:", max_new_tokens=450, mode="full", temperature=3, seed=4
    )
    assert output["choices"][0]["message"]["content"] == expected.text and len(expected.tokens) > 16


def test_completions_end_after_16_tokens_where_no_limit_is_given(server):
    assert server.post(**LONG).json()["usage"]["completion_tokens"] == 16


def test_content_in_parts_and_a_prompt_of_tokens(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    asked = {"temperature": 0, "max_tokens": 4}
    whole = [{"role": "user", "content": f"{QUESTION}\nHow many?"}]
    parts[0]["content"].append({"type": "text", "text": "How many?"})
    answers = [server.post("chat/completions", messages=said, **asked).json() for said in (parts, whole)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"] == answers[1]["usage"]
    tokens = demo_model().text.encode(PROMPT)
    texts = [
        server.post(prompt=prompt, **asked).json()["choices"][0]["text"]
        for prompt in (tokens, [tokens], PROMPT, [PROMPT])
    ]
    assert set(texts) == {demo_model().generate(PROMPT, max_new_tokens=4).text}


def test_depths_are_told_where_they_are_asked_for(server):
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "exit_depths": True}
    for extra in {"mode": "river", "threshold": 0.9}, {"mode": "lossless"}:
        expected = demo_model().generate(PROMPT, max_new_tokens=24, **extra)
        whole = server.post(**asked, **extra).json()["choices"][0]["tokens"]
        events = events_of(server.post(**asked, **extra, stream=True).text)
        streamed = [token for event in events for token in event["choices"][0]["tokens"]]
        facts = zip(expected.tokens, expected.exit_depths, expected.drafted, strict=True)
        assert [(token["id"], token["exit_depth"], token["drafted"]) for token in whole] == list(facts)
        assert streamed == whole
        assert "".join(token["text"] for token in whole) == expected.text
    assert any(expected.drafted)
    assert "tokens" not in server.post(prompt=PROMPT, max_tokens=1).json()["choices"][0]


def test_log_probabilities(server):
    expected = demo_model().generate(PROMPT, max_new_tokens=9, mode="lossless", logprobs=3)
    asked = {"model": server.name, "max_tokens": 9, "temperature": 0}
    told = server.openai.completions.create(**asked, prompt=PROMPT, logprobs=3).choices[0].logprobs
    assert told.token_logprobs == expected.logprobs and "".join(told.tokens) == expected.text
    assert [sorted(top.values(), reverse=True) for top in told.top_logprobs] == [
        [logprob for _, logprob in top] for top in expected.top_logprobs
    ]
    assert [expected.text[start:][:1] for start in told.text_offset] == [name[:1] for name in told.tokens]
    chat = {**asked, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
    content = server.openai.chat.completions.create(**chat).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == expected.logprobs
    assert [entry.token for entry in content] == told.tokens
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
    assert all(entry.token == entry.top_logprobs[0].token for entry in content)  # greedy
    streamed = server.openai.chat.completions.create(**chat, stream=True)
    assert [entry for chunk in streamed for entry in chunk.choices[0].logprobs.content] == content


def test_the_drawn_token_is_among_the_log_probabilities_of_completions(server):
    """As one more, where it is not one of the likeliest."""
    for count in 0, 2:
        told = server.post(**LONG, max_tokens=9, logprobs=count).json()["choices"][0]["logprobs"]
        drawn = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
        assert all(top[token] == logprob for token, logprob, top in drawn)
        assert max(map(len, told["top_logprobs"])) == count + 1


def test_chunks_before_that_of_the_usage_have_none(server):
    for path, prompt in ("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": MESSAGES}):
        asked = prompt | {"max_tokens": 3, "stream": True}
        *chunks, last = events_of(server.post(path, **asked, stream_options={"include_usage": True}).text)
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks) and last["usage"]
        assert not any("usage" in chunk for chunk in events_of(server.post(path, **asked).text))


def test_a_seed_is_drawn_and_told(server):
    asked = {"prompt": "def", "max_tokens": 12, "temperature": 1.5}
    outputs = [server.post(**asked).json() for _ in range(3)]
    seeds = [output["river"]["seed"] for output in outputs]
    assert len(set(seeds)) == 3
    again = [server.post(**asked, seed=seed).json()["choices"] for seed in seeds]
    assert again == [output["choices"] for output in outputs]
    assert len({json.dumps(choices) for choices in again}) > 1


def test_what_asks_for_nothing_is_accepted(server):
    """As clients send it that fill in all fields."""
    plain = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    filled = {
        "n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "suffix": None, "stop": None, "seed": None, "logprobs": None, "user": "someone",
        "threshold": None, "tools": [], "response_format": {"type": "text"}, "stream_options": None,
        "reasoning_effort": None,
    }  # fmt: skip
    assert server.post(**plain, **filled).json()["choices"] == server.post(**plain).json()["choices"]


# --- the rest -------------------------------------------------------------------------------------------


def test_models(server):
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == ("demo-chat", "model") == (server.name, "model")
    assert server.openai.models.retrieve("demo-chat") == model
    assert model.river["layers"] == 16 and model.river["chat"] and model.max_model_len == 512


def test_health(server):
    reply = server.http.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (200, "ok")


def test_metrics_count_what_was_done(server):
    def read():
        names = ("river_prompt_tokens_total", "river_new_tokens_total", "river_drafts_total",
                 "river_quotes_total", "river_accepted_drafts_total",
                 "river_exit_depth_count", "river_exit_depth_sum",
                 "river_time_to_first_token_seconds_count", "river_time_per_token_seconds_count")  # fmt: skip
        return [server.metric(name) for name in names] + [
            server.outcomes(o) for o in ("length", "stop", "refused")
        ]

    before = read()
    output = server.post(**LONG | {"mode": "lossless"}, max_tokens=24).json()
    assert server.post(**LONG, max_tokens=0).status_code == 400
    drafts = [output["river"][name] for name in ("drafts", "quotes", "accepted_drafts")]
    expected = [output["usage"]["prompt_tokens"], 24, *drafts, 24, 24 * 16, 1, 1, 1, 0, 1]
    assert [after - b for after, b in zip(read(), before, strict=True)] == expected
    assert server.metric("river_slots") == 8 and server.metric("river_engine_failed") == 0
    assert server.metric("river_requests_running") == server.metric("river_requests_waiting") == 0


def test_streams_come_piece_by_piece(server):
    """A chunk a step, unless its text is not certain yet."""
    expected = demo_model().generate(**LONG | {"max_new_tokens": 48})
    with server.http.stream(
        "POST", "/v1/completions", json=LONG | {"max_tokens": 48, "stream": True}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        events = events_of("".join(reply.iter_text()))
    assert text_of(events) == expected.text and 24 < len(events) <= 48
