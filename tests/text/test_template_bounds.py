"""Templates that attack: each ends in one error, in a bounded time and a bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from flashrt.text import render, template
from flashrt.text.template import CPU_S, MEMORY_BYTES

MIB = 1 << 20
# Renders, in a process whose children can be told from others, and says what it and they took.
PROGRAM = """
import json, resource, sys
from flashrt.errors import FlashrtError
from flashrt.text.template import ChatTemplate

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
try:
    said = ["text", ChatTemplate(sys.stdin.read(), {}).render([{"role": "user", "content": "hello"}])]
except FlashrtError as error:
    said = [type(error).__name__, str(error)]
child = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([*said, peak() - before, child.ru_maxrss << 10, child.ru_utime + child.ru_stime]))
"""

NESTED = "{% set ns = namespace(x=[1]) %}{% for _ in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='ab') %}{% for _ in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"
LOOPS = "{% for a in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4
ATTACKS = {
    "division": "{{ 1 // 0 }}",
    "remainder": "{{ 1.0 % 0 }}",
    "recursion": "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "product": "{{ 'x' * 3000000000 }}",
    "product of a list": "{{ ([0] * 3000000000) | length }}",
    "product in steps": "{{ ((('x' * 100000) * 1000) * 1000) | length }}",
    "loops": LOOPS,
    "loops without output": LOOPS.replace("x", "{% set y = 1 %}"),
    "a long output": "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide filter": "{{ '%9999999999s' | format('x') }}",
    "a wide method": "{{ '{:>9999999999}'.format(1) }}",
    "a precise format": "{{ '%.2000000000f' % 1.5 }}",
    "indentation": "{{ messages | tojson(indent=2000000000) }}",
    "indented lines": "{{ ('x\\n' * 99999) | indent(99999) }}",
    "justified": "{{ 'x'.ljust(9999999999) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "tabs": "{{ '\\t'.expandtabs(2000000000) }}",
    "filled": "{{ '1'.zfill(9999999999) }}",
    "joined": "{{ ('x' * 9999999).join('y' * 9999999) }}",
    "joined by a filter": "{{ ('y' * 9999999) | join('x' * 9999999) }}",
    "replaced": "{{ ('x' * 999999).replace('', 'x' * 999999) }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power and its digits": "{{ 9 ** 99999999 }}",
    "a shift": "{{ (2 ** 999999999).bit_length() }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "sums": DOUBLED.replace("OP", "ns.x + ns.x"),
    "concatenations": DOUBLED.replace("OP", "ns.x ~ ns.x"),
    "blocks": DOUBLED.replace("{% set ns.x = OP %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "batches": "{{ [1] | batch(999999999, 'x') | list }}",
    "nested": NESTED + "{{ ns.x }}",
    "nested as JSON": NESTED + "{{ ns.x | tojson }}",
    "nested and compared": NESTED + "{{ ns.x == (ns.x | list) }}{{ ns.x | sort }}",
    "nested and copied": NESTED.replace("[1]", "(1,)").replace("[ns.x, ns.x]", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "lorem ipsum": "{{ lipsum(n=99999, max=99999) }}",
    "a number's digits": "{{ ('9' * 4300) | int ** 4300 }}",
    "an error without end": "{{ raise_exception('x' * 40000000) }}",
    "an error of many lines": "{{ raise_exception('x\\n' * 40000) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "brackets": "{{ " + "[" * 150 + "1" + "]" * 150 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a chain of signs": "{{ " + "-" * 100000 + "1 }}",
    "a chain of filters": "{{ 1" + "|abs" * 50000 + " }}",
    "a long expression": "{{ 1" + "+1" * 200000 + " }}",
    "a date": "{{ strftime_now('%Y' * 999999) }}",
}

# One of each mechanism; the others are for `make test-slow`.
QUICK = {"division", "recursion", "product", "loops", "a long output", "a wide format", "indentation", "joined"}
QUICK |= {"a power", "nested", "an error without end", "parentheses", "a chain of filters"}


def attacked(source: str) -> tuple[str, str]:
    """The kind and the message of the error, the bounds checked."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=source, capture_output=True, text=True, check=True)
    kind, message, own, child, seconds = json.loads(done.stdout)
    assert own < 16 * MIB, "the process that has a budget"
    assert child < MEMORY_BYTES + 32 * MIB, "code is not data"
    assert seconds < CPU_S + 3
    return kind, message


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ATTACKS])
def test_an_attack_is_one_error(name: str) -> None:
    kind, message = attacked(ATTACKS[name])
    assert kind in ("CheckpointError", "UsageError"), message[:200]
    assert message.startswith("the model's chat template ")
    assert len(message) < 700
    assert "\n" not in message


def test_what_was_found_is_said() -> None:
    assert "fails: line 3: ZeroDivisionError: division by zero" in attacked("{# a #}\n\n{{ 1 / 0 }}")[1]
    assert "rejects these messages: line 1: roles" in attacked("{{ raise_exception('roles') }}")[1]
    assert f"more than {CPU_S} seconds" in attacked(ATTACKS["loops without output"])[1]
    assert "MemoryError" in attacked(ATTACKS["product"])[1]
    assert "cannot be compiled" in attacked(ATTACKS["parentheses"])[1]
    assert "characters" in attacked("{{ 'x' * 5000000 }}")[1]


def test_bounds_grow_with_the_conversation() -> None:
    """Ten million characters are no attack when somebody has said them."""
    said = "naïve " * 1_700_000
    source = "{% for m in messages %}{{ m | tojson }}{{ m.content | trim }}{% endfor %}"
    text = template.ChatTemplate(source, {}).render([{"role": "user", "content": said}])
    assert text == json.dumps({"role": "user", "content": said}, ensure_ascii=False) + said.strip()


def test_what_json_cannot_express() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for content in (object(), circle):
        with pytest.raises(template.UsageError, match="JSON can express"):
            template.ChatTemplate("{{ messages }}", {}).render([{"role": "user", "content": content}])


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        template.child, "command", lambda module: [sys.executable, "-c", "raise ImportError('no jinja')"]
    )
    with pytest.raises(template.CheckpointError, match="chat template cannot be used: ImportError: no jinja"):
        template.ChatTemplate("", {}).check()


@pytest.mark.parametrize("name", ["''.__class__", "lipsum.__globals__", "messages.__init__", "cycler.__init__.x"])
def test_nothing_of_the_process_is_within_reach(name: str) -> None:
    said = render.answer({"source": "{{ " + name + " }}", "variables": {"messages": []}, "longest": 100})
    assert said == {"text": ""} or said["error"] == "rejected", said
