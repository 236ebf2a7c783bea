"""`river serve --calibrated`: what `river calibrate` found is what requests get that do not say otherwise."""

import pytest
from serving import QUESTION, Server, chat_demo
from tiny_model import demo_model

from river_ext.loading.calibrated import Calibrated, write_calibrated
from river_ext.quant.exit_river import river_sha256

PROMPT = f"Question: {QUESTION}\nAnswer:"
BY_LAYER = (1.0, 0.99, 0.98, *[0.97] * 13)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model, path = demo_model(), tmp_path_factory.mktemp("calibrated") / "calibrated.json"
    found = Calibrated(
        threshold=BY_LAYER, min_layers=2, river_head="w4", draft_tokens=2, fingerprint=model.fingerprint,
        river_sha256=river_sha256(model.river), dtype=model.network.dtype,
    )  # fmt: skip
    write_calibrated(path, found, {"curve": []})
    with Server("--calibrated", path, model=chat_demo()) as server:
        yield server


@pytest.mark.parametrize("asked, expected", [
    ({"mode": "river"}, {"threshold": BY_LAYER, "min_layers": 2, "river_head": "w4"}),
    ({"mode": "river", "min_layers": 2}, {"threshold": BY_LAYER, "min_layers": 2, "river_head": "w4"}),
    ({"mode": "river", "threshold": 0.5}, {"threshold": 0.5}),
    ({"mode": "full"}, {"mode": "full"}),
    ({}, {"mode": "lossless", "draft_tokens": 2}),
    ({"draft_tokens": 3}, {"mode": "lossless", "draft_tokens": 3}),
])  # fmt: skip
def test_what_a_request_does_not_say_is_the_files(server, asked, expected):
    output = server.post(prompt=PROMPT, max_tokens=24, temperature=0, exit_depths=True, **asked).json()
    right = demo_model().generate(PROMPT, max_new_tokens=24, **expected)
    tokens = output["choices"][0]["tokens"]
    assert [token["id"] for token in tokens] == right.tokens
    assert [token["exit_depth"] for token in tokens] == right.exit_depths
    assert output["river"]["drafts"] == right.stats.drafts


def test_what_does_not_go_with_it_is_named(server):
    error = server.post(prompt=PROMPT, mode="river", min_layers=3).json()["error"]
    assert error["param"] == "min_layers" and "which was measured with min_layers=2" in error["message"]


def test_the_page_shows_it(server):
    assert server.http.get("/v1/models").json()["data"][0]["river"]["threshold"] == list(BY_LAYER)
