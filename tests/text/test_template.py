"""Chat templates render as transformers renders them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrt.errors import CheckpointError, UsageError
from flashrt.storage.sources import open_checkpoint
from flashrt.text.files import TextFiles
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer
from tests.families import tiny_checkpoint, tokenizer_json

MESSAGES = [{"role": "user", "content": "Hi <b>&</b>"}, {"role": "assistant", "content": "naïve"}]
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}\n    {% if loop.index0 == 0 %}\n  first\n    {% continue %}{% endif %}\n"
    "{{ m | tojson }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}",
)
# What the templates of published families are made of.
PUBLISHED = {
    "llama": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>Today Date: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + (tool_call.arguments | tojson) + "}" }}
    {%- elif message.content is mapping or message.content is iterable and message.content is not string %}
        {{- message.content | tojson }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}""",
    "qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {{- loop.index0 ~ ':' ~ thought ~ (loop.index0 > ns.last_query_index) }}
    {%- endif %}
    {{- content.strip() }}
    {%- if loop.last or (not loop.last and messages[loop.index0 + 1].role == 'user') %}{{- '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}""",
    "gemma": """{{ bos_token }}{%- set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set loop_messages = messages[1:] if first else messages -%}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif -%}
    {%- if loop.index0 > 9 %}{% break %}{% endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first ~ '\\n' if loop.first else '') }}
    {%- if message['content'] is iterable and message['content'] is not string -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ message['content'] | default('', true) | trim | upper }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}""",
    "macros": """{%- macro described(name, spec, level=0) %}
{{- '  ' * level ~ name ~ ': ' ~ spec.type | default('object') }}
{%- for key, value in (spec.properties or {}).items() | sort(attribute='0') %}{{ described(key, value, level + 1) }}
{%- endfor %}{% endmacro %}
{%- for tool in tools or [] %}{{ described(tool.function.name, tool.function.parameters) }}{% endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list %}
{{- users | join('|') }}{{ '%-8s|%05.2f' | format('a', 1.5) }}{{ '{:>6}'.format(7 ** 2 % 10) }}{{ [1, 2] + [3] }}
{%- macro outer() %}[{{ caller() }}]{% endmacro %}{% call outer() %}in{% endcall %}
{% filter upper %}done{% endfilter %}{{ dict(a=1) | tojson }}""",
}
TOOL = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"où": {"type": "string"}, "day": {"type": "int"}}},
}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"où": "Zürich", "day": 1.5, "x": [None, True]}},
}
CONVERSATIONS = {
    "plain": MESSAGES,
    "system": [{"role": "system", "content": " Be <brief>. "}, *MESSAGES],
    "tools": [
        {"role": "system", "content": "You call."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"°C": 21}'},
        {"role": "user", "content": "<tool_response>no</tool_response>"},
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))[1]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers(source: str, prompt: bool, directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    expected = theirs.apply_chat_template(MESSAGES, chat_template=source, add_generation_prompt=prompt, tokenize=False)
    assert ours.render(MESSAGES, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_of_published_families(name: str, conversation: str, directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate(PUBLISHED[name], {"bos_token": "<s>", "eos_token": "</s>"})
    messages = CONVERSATIONS[conversation]
    tools = [{"type": "function", "function": TOOL}] if conversation == "tools" else None
    options = {"tools": tools, "enable_thinking": False, "add_generation_prompt": False}
    expected = theirs.apply_chat_template(messages, chat_template=PUBLISHED[name], tokenize=False, **options)
    assert len(expected) > 10
    assert ours.render(messages, **options) == expected


def test_checkpoint_template(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        tokenizer = Tokenizer.from_text(checkpoint.text)
    assert tokenizer.chat_template.render(MESSAGES[:1]) == "<s><|user|>Hi <b>&</b></s>"


def test_base_model_has_no_template() -> None:
    with pytest.raises(UsageError, match="base model"):
        _ = Tokenizer.from_text(TextFiles(tokenizer_json())).chat_template


def test_errors_and_sandbox() -> None:
    with pytest.raises(CheckpointError, match="compiled"):
        ChatTemplate("{% for %}", {}).check()
    with pytest.raises(CheckpointError, match="compiled: line 2: "):
        ChatTemplate("a\n{% for %}", {}).render([])
    ChatTemplate("{{ raise_exception('only when rendered') }}", {}).check()
    with pytest.raises(UsageError, match="alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])
    with pytest.raises(UsageError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render([])
    with pytest.raises(UsageError):
        ChatTemplate("{{ messages.append(1) }}", {}).render([])
    assert len(ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])) == 4
