"""The page of the server, in a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, Browser
from serving import QUESTION, Server, shared_server
from tiny_model import demo_model

from river_ext.serve import app
from river_ext.trace import policy_of

PROMPT = f"Question: {QUESTION}\nAnswer:"
HOSTILE = "</script><img src=x onerror=\"document.title = 'executed'\">\u202e"


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def test_the_page_loads_nothing_and_its_policy_is_strict(server):
    reply = httpx.get(server.url)
    assert reply.text == Path(app.PAGE).read_text()
    policy = reply.headers["content-security-policy"]
    assert policy.startswith(policy_of(reply.text)) and "default-src 'none'" in policy
    assert "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    loaded = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attributes):
            loaded.extend(value for name, value in attributes if name in ("src", "href", "action", "style"))

    Loads().feed(reply.text)
    assert not loaded and not re.search(r"https?://|url\(|@import|innerHTML|\beval\(", reply.text)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium here; the Debian package chromium has it")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(tab, server):
    """Afresh, with its model."""
    tab.messages.clear()
    tab.go(server.url)
    tab.wait_for("document.getElementById('model').textContent !== ''")
    yield tab
    assert tab.run("document.title") == "River"
    assert complaints(tab) == []


def complaints(tab) -> list[dict]:
    """What the browser calls an error, in what it loads and in what runs."""
    told = [(entry["method"], entry.get("params", {})) for entry in tab.messages]
    logged = [params["entry"] for method, params in told if method == "Log.entryAdded"]
    thrown = [params for method, params in told if method == "Runtime.exceptionThrown"]
    return [entry for entry in logged if entry["level"] in ("warning", "error")] + thrown


def choose(page, **values) -> None:
    """Sets controls, as a user does."""
    for name, value in values.items():
        place = f"document.getElementById({json.dumps(name.replace('_', '-'))})"
        page.run(f"{place}.value = {json.dumps(value)}; {place}.dispatchEvent(new Event('input'))")


def say(page, text: str) -> None:
    choose(page, prompt=text)
    page.run("document.getElementById('form').requestSubmit()")


def test_thresholds_by_layer_are_the_servers_until_one_is_chosen(page):
    page.run("facts.river.threshold = [1, 0.9]; showThreshold()")
    shown = "document.getElementById('shown-threshold').textContent"
    assert page.run(shown) == "by layer"
    choose(page, threshold=0.5)
    assert page.run(shown) == "0.50"


def tokens_of_last(page) -> list[dict]:
    page.wait_for("document.getElementById('stop').hidden && !!document.querySelector('article')")
    return page.run(
        "[...[...document.querySelectorAll('article')].at(-1).querySelectorAll('.token')].map(token => ({"
        "text: token.textContent, depth: Number(token.style.getPropertyValue('--depth')) * 16,"
        "drafted: token.classList.contains('drafted'), colour: getComputedStyle(token).backgroundColor}))"
    )


def facts_of_last(page) -> str:
    return page.run("[...document.querySelectorAll('.facts')].at(-1).textContent")


def test_a_chat_in_lossless_mode(page):
    assert page.run("at('model').textContent") == "demo-chat: 16 layers, 8 slots of up to 512 tokens"
    assert page.run("at('mode').value") == "lossless" and page.run("at('threshold-of').hidden")
    expected = demo_model().generate(PROMPT, mode="lossless")
    say(page, QUESTION)
    shown = tokens_of_last(page)
    assert "".join(token["text"] for token in shown) == expected.text
    assert sum(token["drafted"] for token in shown) > len(shown) // 2
    colours = [
        {token["colour"] for token in shown if token["drafted"] == drafted} for drafted in (True, False)
    ]
    assert [len(some) for some in colours] == [1, 1] and colours[0] != colours[1]
    line = facts_of_last(page)
    assert re.match(rf"{len(expected.tokens)} tokens; [\d.]+ tokens/s; mean exit depth 16.0 of 16; ", line)
    assert f"{sum(expected.drafted)} accepted drafts; ended by stop" in line
    say(page, "And then?")  # the turn before is a part of the prompt
    page.wait_for("document.querySelectorAll('article').length === 2")
    turns = f"{PROMPT}{expected.text}\nQuestion: And then?\nAnswer:"
    again = demo_model().generate(turns, mode="lossless").text
    assert "".join(token["text"] for token in tokens_of_last(page)) == again


def test_mode_and_threshold_are_the_users(page):
    choose(page, mode="river", threshold="0.9")
    assert (
        not page.run("at('threshold-of').hidden") and page.run("at('shown-threshold').textContent") == "0.90"
    )
    say(page, QUESTION)
    expected = demo_model().generate(PROMPT, mode="river", threshold=0.9)
    shown = tokens_of_last(page)
    texts = "".join(token["text"] for token in shown)
    assert texts == expected.text
    depths = {token["depth"] for token in shown}
    assert depths <= set(expected.exit_depths) and len(depths) > 2
    assert len({token["colour"] for token in shown}) == len(depths)  # each its own


def test_what_a_user_writes_is_text(page):
    say(page, HOSTILE)
    tokens_of_last(page)
    assert page.run("document.querySelector('.said').textContent") == HOSTILE
    assert page.run("document.querySelectorAll('img').length") == 0


def test_no_other_script_runs(page):
    page.run(
        "const added = document.createElement('script'); added.textContent = 'document.title = \"executed\"';"
        "document.body.append(added)"
    )
    assert page.run("document.title") == "River"
    (refused,) = complaints(page)
    assert "Content Security Policy" in refused["text"]
    page.messages.clear()


def test_what_the_server_refuses_is_shown(page):
    choose(page, new_tokens="600")
    say(page, QUESTION)
    tokens_of_last(page)
    assert "max_tokens=600; accepted: 512 in all" in facts_of_last(page)
    choose(page, new_tokens="4")
    say(page, QUESTION)  # what was refused is not a part of the conversation
    page.wait_for("document.querySelectorAll('article').length === 2")
    assert "".join(token["text"] for token in tokens_of_last(page)) == " 21 +"
    (noted,) = complaints(page)
    assert "400 (Bad Request)" in noted["text"]
    page.messages.clear()


def test_a_key_is_asked_for_and_an_answer_can_be_stopped(tab):
    with Server(sleeps=0.2, key="a key") as server:  # the answer takes 29 steps
        tab.go(server.url)
        tab.wait_for("at('model').textContent.startsWith('no valid API key')")
        tab.wait_for("!at('key-of').hidden")
        choose(tab, key="a key", mode="full")
        say(tab, QUESTION)
        tab.wait_for("document.querySelectorAll('.token').length > 3")
        tab.run("at('stop').click()")
        tab.wait_for("at('stop').hidden")
        assert facts_of_last(tab).endswith("; stopped")
        server.wait_for("river_requests_running", 0)
        assert server.outcomes("disconnected") == 1
        say(tab, QUESTION)
        tab.wait_for("document.querySelectorAll('article').length === 2")
        tab.wait_for("at('log').lastChild.querySelectorAll('.token').length > 0")
        tab.run("at('anew').click()")
        tab.wait_for("at('stop').hidden")
        assert tab.run("messages") == [] and tab.run("at('log').childElementCount") == 0
