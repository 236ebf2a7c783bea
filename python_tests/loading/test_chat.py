"""Chat templates: as in transformers, and none that harm the process or the machine."""

import json
import os
import random
import signal
import time

import pytest
from conftest import write_tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import river_ext
from river_cli import shared
from river_ext.errors import RiverError
from river_ext.loading import chat
from river_ext.loading.chat import ChatTemplate, checked_messages, read_template, template_names
from river_ext.loading.config import read_config
from river_ext.loading.text import Text
from river_ext.loading.tokenizer import load_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>",
           "<end_of_turn>", "<|user|>", "<|end|>"]  # fmt: skip
HI = [{"role": "user", "content": "hi"}]

LLAMA = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
        {%- for part in message.content or [] %}{%- set content = content + part.text %}{%- endfor %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n<tool_call>' }}{{- tool_call.function | tojson }}{{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, not ' + message['role'] + '!') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
  {% if message['content'] is string %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
  {% elif message['content'] is iterable %}
    {% for item in message['content'] %}
      {% if item['type'] == 'text' %}
<start_of_turn>{{ role }}
{{ item['text'] | trim }}<end_of_turn>
      {% endif %}
    {% endfor %}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

PHI = """{% macro turn(role, text='') -%}<|{{ role }}|>
{{ text }}{% endmacro -%}
{% set seen = dict(user=0) -%}
{% for message in messages %}
{% if message.role == 'system' and not message.content %}{% continue %}{% endif %}
{% if loop.index > 6 %}{% break %}{% endif %}
{{ turn(message.role, message.content) }}{% generation %}<|end|>{% endgeneration %}

{% endfor %}
{{ '%s of %d: %r' | format(messages | map(attribute='role') | join(','), messages | length, seen) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | tojson(sort_keys=true) }}
{% if add_generation_prompt %}{{ turn('assistant') }}{% else %}{{ eos_token }}{% endif %}
"""

TEMPLATES = {"llama": LLAMA, "chatml": CHATML, "mistral": MISTRAL, "gemma": GEMMA, "phi": PHI}


# --- as in transformers ---------------------------------------------------------------------------------


def write_tokenizer(directory, template: str | None = None, **config):
    """Ids 0..255 are bytes, then SPECIAL; the tokenizer by itself puts <s> before a text."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def chat_checkpoint(tmp_path):
    """Factory: chat_checkpoint(template or None, **tokenizer_config) -> directory of a random checkpoint."""

    def write(template: str | None = CHATML, **config):
        directory = write_tiny_checkpoint(tmp_path / "chat", vocab_size=270, max_position_embeddings=512)
        return write_tokenizer(directory, template, **config)

    return write


def text_of(directory) -> Text:
    return Text(load_tokenizer(directory), read_config(directory), directory)


CONTENTS = ["hi", "", "  spaces  \n", "Größe 中文 😀", '<b>"a" & \'b\'</b>', "<s>[INST]</s>", "a\r\nb\t",
            "{{ 1 }}{% if %}", "<think>\nwhy\n</think>\n\nso", "x" * 300]  # fmt: skip
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "é": [None, True, 0.5, "<>"]}}}


def random_messages(rng: random.Random) -> list[dict]:
    """Mostly as templates want them: system at the start, then user and assistant in turns."""
    roles = ["system"] * rng.randrange(2) + (["user", "assistant"] * 3)[: rng.randrange(1, 6)]
    if rng.random() < 0.2:
        roles[rng.randrange(len(roles))] = rng.choice(["tool", "system", "user", "wizard"])
    return [random_message(rng, role) for role in roles]


def random_message(rng: random.Random, role: str) -> dict:
    message = {"role": role, "content": rng.choice(CONTENTS)}
    if rng.random() < 0.1:
        texts = rng.sample(CONTENTS, rng.randrange(1, 3))
        message["content"] = [{"type": "text", "text": text} for text in texts]
    if rng.random() < 0.1:
        message["name"] = rng.choice(["Ann", None])
    if role == "assistant" and rng.random() < 0.3:
        calls = [{"tool_calls": [CALL], "content": None}, {"tool_calls": None}]
        message |= rng.choice([*calls, {"reasoning_content": "because"}, {"thinking": "hm"}])
    return message


def random_variables(rng: random.Random) -> dict:
    variables = {"add_generation_prompt": rng.random() < 0.7}
    if rng.random() < 0.2:
        variables["tools"] = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    if rng.random() < 0.2:
        variables |= {"enable_thinking": False, "date_string": "1 Jan 2030", "bos_token": "<|user|>"}
    return variables


def result_of(call, error: type[Exception], *arguments, **variables):
    """None where it fails."""
    try:
        return call(*arguments, **variables)
    except error:
        return None


@pytest.mark.parametrize("family", TEMPLATES)
def test_texts_and_tokens_are_those_of_transformers(chat_checkpoint, family):
    transformers = pytest.importorskip("transformers")
    directory = chat_checkpoint(TEMPLATES[family])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), text_of(directory)
    template = ChatTemplate.read(directory)
    rng = random.Random(family)
    made = 0
    for _ in range(60):
        messages, variables = random_messages(rng), random_variables(rng)
        expected = result_of(theirs.apply_chat_template, Exception, messages, tokenize=False, **variables)
        assert result_of(template.render, RiverError, messages, **variables) == expected, messages
        if expected is not None:
            made += 1
            ids = theirs.apply_chat_template(messages, **variables)
            assert ours.chat(messages, **variables) == getattr(ids, "input_ids", ids)
    assert made > 20


def test_carriage_returns_and_marks_in_the_file(chat_checkpoint):
    transformers = pytest.importorskip("transformers")
    directory = chat_checkpoint()
    source = "\ufeff{% for m in messages %}\r\n  {% if true %}\r{{ m.content + 'a\r\n' }}\r\n{% endif %}\n"
    source += "{% endfor %}\n"
    (directory / "chat_template.jinja").write_bytes(source.encode())
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert ChatTemplate.read(directory).render(HI) == theirs.apply_chat_template(HI, tokenize=False)


# --- where templates are read from ----------------------------------------------------------------------


def test_the_file_comes_before_tokenizer_config(tmp_path):
    write_tokenizer(tmp_path, "file", chat_template="config")
    assert read_template(tmp_path) == (tmp_path / "chat_template.jinja", "file")
    (tmp_path / "chat_template.jinja").unlink()
    assert read_template(tmp_path) == (tmp_path / "tokenizer_config.json", "config")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer(tmp_path, chat_template=named)
    assert read_template(tmp_path)[1] == "plain"
    assert read_template(tmp_path, "tool_use") == (tmp_path / "tokenizer_config.json", "tools")
    assert template_names(tmp_path) == ["tool_use", "default"]
    add_template(tmp_path, "rag", "retrieved")
    assert template_names(tmp_path) == ["rag"], "files replace all that tokenizer_config.json has"
    with pytest.raises(RiverError, match="no chat template 'tool_use'; accepted: chat_template='rag'"):
        read_template(tmp_path, "tool_use")


def test_where_no_template_is_found(tmp_path):
    assert template_names(tmp_path) == []
    (tmp_path / "additional_chat_templates").write_text("no directory")
    assert template_names(write_tokenizer(tmp_path)) == []


def add_template(directory, name: str, template: str) -> None:
    path = directory / "additional_chat_templates" / f"{name}.jinja"
    path.parent.mkdir(exist_ok=True)
    path.write_text(template)


NAMED = {
    name: f"{name}: {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    for name in ("default", "tool_use", "rag")
}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("stored", ["list", "files", "saved by transformers"])
def test_named_templates_as_in_transformers(chat_checkpoint, stored):
    transformers = pytest.importorskip("transformers")
    as_list = [{"name": name, "template": text} for name, text in NAMED.items()]
    if stored == "files":
        directory = chat_checkpoint(NAMED["default"])
        for name in ("tool_use", "rag"):
            add_template(directory, name, NAMED[name])
    else:
        directory = chat_checkpoint(None, chat_template=as_list)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    if stored == "saved by transformers":
        theirs.save_pretrained(directory)
        assert (directory / "additional_chat_templates" / "rag.jinja").exists()
    assert sorted(template_names(directory)) == sorted(NAMED)
    ours, made = text_of(directory), set()
    for choice in (None, *NAMED):
        for tools in (None, TOOLS, []):
            expected = theirs.apply_chat_template(HI, chat_template=choice, tools=tools, return_dict=False)
            assert ours.chat(HI, chat_template=choice, tools=tools) == expected, (choice, tools)
            made.add(tuple(expected))
    assert len(made) == 3


def test_a_template_is_chosen_by_a_name_that_it_has(chat_checkpoint):
    directory = chat_checkpoint(NAMED["default"])
    add_template(directory, "rag", NAMED["rag"])
    text = text_of(directory)
    assert text.chat(HI, chat_template="rag") == text._tokens("rag: hi", add_special_tokens=False)
    with pytest.raises(RiverError, match="no chat template 'x'; accepted: chat_template='default', 'rag'"):
        text.chat(HI, chat_template="x")
    for name in ("../chat_template", "../additional_chat_templates/rag", "\0", ""):
        with pytest.raises(RiverError, match="has no chat template '"):
            text.chat(HI, chat_template=name)
    with pytest.raises(RiverError, match="chat_template is a list; accepted: the name"):
        text.chat(HI, chat_template=["rag"])


@pytest.mark.parametrize(
    "template, named",
    [
        (None, "has no chat template; accepted: chat_template.jinja, or"),
        (7, "chat_template is 7; accepted:"),
        ({"default": "x"}, "chat_template is {"),
        ([], "has no chat template; accepted: chat_template.jinja, or"),
        ([{"name": "t", "template": "x"}], "has no chat template 'default'; accepted: chat_template='t'"),
        ([{"name": "default", "template": 1}], 'chat_template holds {"name": "default"'),
        (["default"], 'chat_template holds "default"'),
        ("x" * (1 << 21), "a chat_template of 2097152 characters"),
    ],
)
def test_what_tokenizer_config_may_hold(tmp_path, template, named):
    with pytest.raises(RiverError) as error:
        read_template(write_tokenizer(tmp_path, chat_template=template))
    assert named in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "large", "latin-1"])
def test_files_that_are_no_template(tmp_path, kind):
    path = write_tokenizer(tmp_path) / "chat_template.jinja"
    make = {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "link": lambda: path.symlink_to("nowhere"),
        "large": lambda: path.write_text(" " * (1 << 21)),
        "latin-1": lambda: path.write_bytes(b"caf\xe9"),
    }
    make[kind]()
    with pytest.raises(RiverError, match="chat_template.jinja: "):
        read_template(tmp_path)


# --- messages that are refused --------------------------------------------------------------------------


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "messages, named",
    [
        ([], "no messages for the chat template"),
        ("hi", "a str for the chat template"),
        ([*HI, "hi"], "message 1 is a str"),
        ([{"content": "hi"}], "message 0 has no 'role'"),
        ([{"role": None, "content": "hi"}], "message 0 has no 'role'"),
        ([*HI, {"role": "user"}], "message 1 has no 'content'"),
        (user(None), "message 0 has no 'content'"),
        ([{"role": 7, "content": "hi"}], "the role of message 0 is a int"),
        (user(7), "the content of message 0 is a int; accepted: text"),
        (user(b"hi"), "the content of message 0 is a bytes"),
        (user([{"type": "image", "url": "x"}]), "message 0 has a part of type 'image'; accepted: text"),
        (user([{"type": "text", "text": "a"}, {"type": "image_url"}]), "a part of type 'image_url'"),
        (user([{"text": "a"}]), "a part of type 'None'"),
        (user([{"type": "text"}]), "message 0 has a text part without text"),
        (user(["a"]), "message 0 has a str in its content"),
    ],
)
def test_messages_that_are_refused(messages, named):
    with pytest.raises(RiverError) as error:
        checked_messages(messages)
    assert named in str(error.value) and "accepted: " in str(error.value)


def test_values_that_are_no_json():
    loop = []
    loop.append(loop)
    for value in ({1, 2}, loop, lambda: 0):
        with pytest.raises(RiverError, match="cannot be written as JSON"):
            template("x").render(HI, tools=value)


# --- templates that are refused, and those that never end -----------------------------------------------


def template(source: str) -> ChatTemplate:
    return ChatTemplate("here", source, {})


LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source, named",
    [
        ("{% for %}", "does not compile: line 1: "),
        ("a\n{{ 'b' ", "does not compile: line 2: "),
        ("{{ x | nothing }}", "does not compile: line 1: No filter named 'nothing'"),
        ("{{" + "(" * 9999 + ")" * 9999 + "}}", "does not compile: RecursionError"),
        ("{{ raise_exception('No\nrole: ' + messages[0].role) }}", "refuses the messages: No role: user"),
        ("{{ raise_exception('x' * 99999) }}", "refuses the messages: xxx"),
        ("{{ ''.__class__ }}", "is refused by the sandbox: the attribute '__class__' is unsafe"),
        ("{{ ''['__class__'] }}", "is refused by the sandbox"),
        ("{{ '' | attr('__class__') }}", "is refused by the sandbox"),
        ("{{ [''] | map(attribute='__class__') | list }}", "is refused by the sandbox"),
        ("{{ '{0.__class__}'.format('') }}", "is refused by the sandbox"),
        ("{{ dict.__init__ }}", "is refused by the sandbox"),
        ("{{ raise_exception.__globals__ }}", "is refused by the sandbox"),
        ("{% set n = namespace(_x=1) %}", "is refused by the sandbox"),
        ("{% set n = namespace() %}{% set n.__x = 1 %}", "is refused by the sandbox"),
        ("{{ messages.append(1) }}", "is refused by the sandbox"),
        ("{{ range(10 ** 9) }}", "fails: OverflowError"),
        ("{{ messages.x.y }}", "fails: UndefinedError: "),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{% include '/etc/passwd' %}", "fails: TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        ("{{ 'x'.center(10 ** 8) }}", "makes more than 16777216 characters"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "makes more than 16777216 characters"),
        ("{{ 'x' * 10 ** 12 }}", "ends the process that renders it (code 1); accepted: "),
        (LONG_LOOP, "takes more than 1 s of processor time"),
        ("{{ 10 ** (10 ** 9) }}", "takes more than 1 s of processor time"),
    ],
)
def test_templates_that_are_refused(monkeypatch, source, named):
    monkeypatch.setattr(chat, "CPU_SECONDS", 1)
    with pytest.raises(RiverError) as error:
        template(source).render(HI)
    assert f"here: the chat template {named}" in str(error.value) and len(str(error.value)) < 400


@pytest.fixture
def hanging():
    """A template that never ends for the message "loop", and writes all others."""
    loop = "{% if messages[0].content == 'loop' %}" + LONG_LOOP + "{% endif %}"
    return template(loop + "{{ messages[0].content }}")


def test_messages_that_end_the_worker_do_not_harm_the_next(monkeypatch, hanging):
    monkeypatch.setattr(chat, "CPU_SECONDS", 1)
    assert hanging.render(user("a")) == "a"
    with pytest.raises(RiverError, match="processor time"):
        hanging.render(user("loop"))
    assert hanging.render(user("b")) == "b"


def test_an_interrupt_does_not_mix_up_answers(hanging):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            hanging.render(user("loop"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hanging.render(user("b")) == "b"


def test_a_forked_process_has_a_worker_of_its_own(hanging):
    assert hanging.render(user("a")) == "a"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if hanging.render(user("b")) == "b" else 2
            hanging._stop()
        finally:
            os._exit(code)
    assert hanging.render(user("c")) == "c"
    assert os.waitpid(child, 0)[1] == 0
    assert hanging.render(user("d")) == "d"


def test_the_worker_ends_with_its_template():
    renderer = template("{{ messages[0].content }}")
    renderer.render(HI)
    worker = renderer._worker
    del renderer
    assert worker.returncode is not None and worker.stdin.closed and worker.stdout.closed


def test_further_messages_are_quick(hanging):
    hanging.render(HI)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        hanging.render(HI)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


# --- generate, stream and the command -------------------------------------------------------------------


def test_generate_takes_messages(chat_checkpoint):
    model = river_ext.load(chat_checkpoint())
    other = [{"role": "system", "content": "Be brief."}, *HI]
    tokens, others = model.text.chat(HI), model.text.chat(other)
    assert tokens != model.text.chat(HI, enable_thinking=False)
    assert tokens[0] == model.tokenizer.token_to_id("<|im_start|>")  # and no <s> before it
    alone = model.generate(HI, max_new_tokens=4)
    assert alone.tokens == model.generate(tokens, max_new_tokens=4).tokens
    assert alone.stats.prompt_tokens == len(tokens)
    assert [piece.token for piece in model.stream(tuple(HI), max_new_tokens=4)] == alone.tokens
    for prompts in ([HI, other], [other, "hi", tokens], ["hi", HI], [[1, 2], HI], [HI]):
        given = [{id(HI): tokens, id(other): others}.get(id(prompt), prompt) for prompt in prompts]
        outputs = model.generate(prompts, max_new_tokens=4)
        assert [o.tokens for o in outputs] == [o.tokens for o in model.generate(given, max_new_tokens=4)]


@pytest.mark.parametrize(
    "prompt, named",
    [
        (HI[0], "prompt is a dict without input_ids; accepted: one with them, or a list of chat messages"),
        ([HI, HI[0]], "prompt is a dict without input_ids"),
        ([HI, []], "the prompt is empty"),
        ([*HI, "hi"], "message 1 is a str"),
        (user([{"type": "image"}]), "a part of type 'image'"),
        (user("x" * 600), "positions"),
        (user("\ud800"), "lone surrogate"),
    ],
)
def test_prompts_that_are_refused(chat_checkpoint, prompt, named):
    model = river_ext.load(chat_checkpoint())
    with pytest.raises(RiverError) as error:
        model.generate(prompt, max_new_tokens=4)
    assert named in str(error.value)


def test_a_checkpoint_without_a_template(chat_checkpoint):
    model = river_ext.load(chat_checkpoint(None))
    with pytest.raises(RiverError, match="has no chat template"):
        model.generate(HI)
    model._engines.text = None
    with pytest.raises(RiverError, match="needs a tokenizer"):
        model.generate(HI)


def test_the_command_wraps_prompts_in_messages(chat_checkpoint, river, river_json, tmp_path):
    directory = chat_checkpoint()
    command = ["generate", "--model", directory, "--max-new-tokens", 4]
    expected = river_ext.load(directory).generate(HI, max_new_tokens=4)
    output = river_json(*command, "--chat", "hi")["outputs"][0]
    assert output["prompt"] == HI and output["tokens"] == expected.tokens
    (tmp_path / "prompt").write_text("hi\n")
    outputs = river_json(*command, "--chat", "a", "--file", tmp_path / "prompt")["outputs"]
    assert [output["prompt"] for output in outputs] == [user("a"), HI]
    assert river(*command, "--chat", "a", "hi")[1].count("--- ") == 2
    assert river(*command, "--chat", "--compare", "hi")[0] == 0


def test_commands_that_are_refused(refused, monkeypatch):
    monkeypatch.setattr(shared, "load", lambda arguments: pytest.fail("too late"))
    assert "--chat without a prompt" in refused("generate", "--demo", "--chat")
    assert "has no chat template" in refused("generate", "--demo", "--chat", "hi")
