"""`river chat`: turns from standard input, answers as they come."""

import io
import json
import shutil

import pytest

import river_ext
from river_cli import chat as chat_module
from river_ext.engine import engine as engine_module
from river_ext.model import DEMO

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n"
    "{% elif message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
FIRST, SECOND = "Ana has 21 coins and buys 12 more. How many coins does Ana have?", "How many are left?"
SHORT = ("--max-new-tokens", "24", "--mode", "full")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The demo model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(DEMO, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def chat(river, directory, monkeypatch):
    """Says some lines: (exit code, standard output, standard error)."""

    def say(*lines, options=SHORT):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return river("chat", directory, *options)

    return say


@pytest.fixture
def starts(monkeypatch):
    """(prompt length, where the prefill begins) of each answer."""
    seen, make = [], engine_module.Prefill

    def counted(network, cache, slot, request, start, progress):
        seen.append((len(request.prompt), start))
        return make(network, cache, slot, request, start)

    monkeypatch.setattr(engine_module, "Prefill", counted)
    return seen


def answers(directory, *said, system=None, new_tokens=24):
    """What `generate` says to a conversation, turn by turn, from its beginning each time."""
    model = river_ext.load(directory)
    messages, texts = [{"role": "system", "content": system}] if system else [], []
    for content in said:
        messages.append({"role": "user", "content": content})
        texts.append(model.generate(messages, max_new_tokens=new_tokens, mode="full").text)
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_turns(chat, starts, directory):
    """Each answer is that to the whole conversation, of which only the new tokens are computed."""
    code, out, err = chat(FIRST, SECOND, "", FIRST)
    assert (code, err) == (0, "")
    assert out == "".join(f"{text}\n" for text in answers(directory, FIRST, SECOND, FIRST))
    (first, _), (second, taken), (third, more) = starts[:3]
    assert first <= taken < second <= more < third, "what the turns before wrote is taken over"


@pytest.mark.parametrize(
    "options, mode",
    [((), "lossless"), (("--draft-tokens", "2"), "lossless"), (("--threshold", "0.9"), "river"),
     (("--prefill", "last"), "river"), (("--river-head", "w4"), "river"), (("--mode", "full_w4"), "full_w4")],
)  # fmt: skip
def test_answers_are_the_backbones_own_unless_asked_for_others(chat, monkeypatch, options, mode):
    asked, submit = [], chat_module.Conversation.answer
    monkeypatch.setattr(
        chat_module.Conversation, "answer", lambda own, said: (asked.append(own.options), submit(own, said))
    )
    code, out, _ = chat(FIRST, options=("--max-new-tokens", "4", *options))
    assert code == 0 and out and asked[0]["mode"] == mode


def test_a_system_message(chat, directory):
    code, out, _ = chat(FIRST, options=(*SHORT, "--system", "Be brief."))
    assert code == 0 and out == answers(directory, FIRST, system="Be brief.")[0] + "\n"


def test_a_new_conversation(chat, directory):
    _, out, _ = chat(FIRST, "/new", SECOND, "/exit", "never read")
    assert out == "".join(f"{answers(directory, text)[0]}\n" for text in (FIRST, SECOND))


def test_a_new_conversation_begins_with_the_system_message_again(chat, directory):
    _, out, _ = chat(FIRST, "/new", SECOND, "/new", FIRST, options=(*SHORT, "--system", "Be brief."))
    said = (FIRST, SECOND, FIRST)
    assert out == "".join(f"{answers(directory, text, system='Be brief.')[0]}\n" for text in said)


def test_as_json(chat, directory):
    code, out, _ = chat(FIRST, SECOND, options=(*SHORT, "--json"))
    documents = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [document["user"] for document in documents] == [FIRST, SECOND]
    assert [document["text"] for document in documents] == answers(directory, FIRST, SECOND)


@pytest.mark.parametrize("mode", ["lossless", "river"])
def test_modes(chat, directory, mode):
    code, out, _ = chat(FIRST, SECOND, options=("--max-new-tokens", "24", "--mode", mode))
    assert code == 0
    if mode == "lossless":
        assert out == "".join(f"{text}\n" for text in answers(directory, FIRST, SECOND))


def test_a_conversation_that_grows_too_long(chat, monkeypatch):
    monkeypatch.setattr(chat_module, "MOST_POSITIONS", 60)
    code, out, err = chat(FIRST, FIRST, FIRST)
    assert code == 2 and out.count("\n") >= 1, "the first has its answer"
    assert err.startswith("river: error: a prompt of ") and "this engine has 1 slots of 60" in err


@pytest.mark.parametrize("room", [1, 2, 9])
def test_an_answer_may_fill_the_conversation(chat, monkeypatch, room):
    """To its last position; the last token of all needs none."""
    options = (*SHORT, "--json")
    whole = json.loads(chat(FIRST, options=options)[1])
    length = whole["stats"]["prompt_tokens"]
    monkeypatch.setattr(chat_module, "MOST_POSITIONS", length + room - 1)
    code, out, _ = chat(FIRST, options=options)
    assert code == 0 and json.loads(out)["tokens"] == whole["tokens"][:room]


@pytest.mark.parametrize("wanted", ["300", "511"])
def test_an_answer_may_be_as_long_as_the_model_takes(chat, directory, wanted):
    """A model of fewer positions than a conversation may have."""
    code, out, err = chat(FIRST, options=("--max-new-tokens", wanted, "--mode", "full"))
    assert (code, err) == (0, "") and out == answers(directory, FIRST, new_tokens=100)[0] + "\n"


def test_what_is_refused_is_no_turn(chat, monkeypatch, directory):
    """At a terminal the conversation goes on as if it had not been said."""
    monkeypatch.setattr(chat_module, "MOST_POSITIONS", 160)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    code, out, err = chat(FIRST, "many words " * 40, SECOND)
    assert code == 0 and err.count("this engine has 1 slots of 160; /new begins a new conversation") == 1
    assert out == "".join(f"{text}\n" for text in answers(directory, FIRST, SECOND))


def test_an_interrupt_ends_the_answer_alone(chat, monkeypatch, directory):
    step, interrupted = engine_module.Engine.step, []

    def interrupting(self):
        if not interrupted and self._steps.members:
            interrupted.append(True)
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(engine_module.Engine, "step", interrupting)
    code, out, _ = chat(FIRST, "/new", SECOND)
    assert code == 0 and interrupted
    first, second = out.splitlines()[0], answers(directory, SECOND)[0]
    assert out.endswith(f"{second}\n") and answers(directory, FIRST)[0].startswith(first)


def test_an_interrupt_at_the_last_word(chat, monkeypatch, directory):
    """The answer has ended when it comes, in the middle of printing."""
    words, printable = [], chat_module.printable

    def interrupting(text):
        words.append(text)
        if len(words) == 24:
            raise KeyboardInterrupt
        return printable(text)

    monkeypatch.setattr(chat_module, "printable", interrupting)
    code, out, _ = chat(FIRST, "/new", SECOND)
    assert code == 0 and len(words) > 24 and out.endswith(f"{answers(directory, SECOND)[0]}\n")


@pytest.mark.parametrize("room", [1, 9])
def test_an_answer_that_fills_the_model(chat, directory, room):
    """As long as the prompt leaves it room, where more is wanted."""
    file = directory / "config.json"
    config, whole = json.loads(file.read_text()), json.loads(chat(FIRST, options=(*SHORT, "--json"))[1])
    length = whole["stats"]["prompt_tokens"] + room
    options = ("--json", "--max-new-tokens", str(length - 1), "--mode", "full")
    file.write_text(json.dumps(config | {"max_position_embeddings": length}))
    try:
        code, out, err = chat(FIRST, options=options)
    finally:
        file.write_text(json.dumps(config))
    assert (code, err) == (0, "") and json.loads(out)["tokens"] == whole["tokens"][:room]


def test_an_interrupted_answer_is_a_turn(chat, monkeypatch, directory):
    """What there is of it has been said."""
    step, steps = engine_module.Engine.step, []

    def interrupting(self):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(engine_module.Engine, "step", interrupting)
    _, out, _ = chat(FIRST, SECOND)
    said = out.splitlines()[0]
    messages = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": SECOND})
    expected = river_ext.load(directory).generate(messages, max_new_tokens=24, mode="full").text
    assert said and out == f"{said}\n{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--demo",), "chat_template"),
        ((), "one of the arguments"),
        (("--demo", "--mode", "half"), "mode='half'"),
        (("--demo", "--draft-tokens", "9", "--mode", "lossless"), "draft_tokens=9"),
        (("--demo", "--batch-policy", "most"), "batch_policy='most'"),
        (("--demo", "--system", "\udcff"), "--system '\\udcff' is no UTF-8"),
    ],
)
def test_refusals(refused, arguments, message):
    assert message in refused("chat", *arguments)
