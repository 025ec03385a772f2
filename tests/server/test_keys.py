"""Who may ask: keys, and addresses beyond this machine."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.cli.conftest import Cli, cache_home, check_failure, cli  # noqa: F401 - fixtures
from tests.server.conftest import KEY, Start, user


@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_key_is_asked_for_and_never_shown(start: Start, tiny: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    arguments = ["--api-key-file", tmp_path / "key"] if where == "file" else []
    server = start(tiny, *arguments, env={} if where == "file" else {"FLASHRT_API_KEY": KEY})
    create = server.client().chat.completions.create
    assert create(model=server.name, messages=user("on"), max_tokens=2).choices
    for wrong in ("x", KEY[:-1], KEY + "x", "\u00e9" * 8):
        headers = {"authorization": f"Bearer {wrong}".encode()}
        replies = [server.get(path, headers=headers) for path in ("/v1/models", "/metrics", "/nowhere")]
        assert [reply.status_code for reply in replies] == [401] * 3
        assert KEY not in replies[0].text
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="another-key").models.list()
    assert server.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200
    assert server.get("/health").status_code == 200
    assert (
        server.get("/v1/models", headers={"authorization": f"Bearer {KEY}", "host": "box.example"}).status_code == 200
    )
    assert KEY not in "".join(server.log)
    assert KEY.encode() not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert server.stop() == 0


def test_beyond_this_machine_takes_a_key_or_a_word(cli: Cli, start: Start, tiny: Path) -> None:  # noqa: F811
    for host in ("0.0.0.0", "::", "example.invalid"):
        check_failure(cli("serve", tiny, "--host", host, "--port", 0), 2, host, "--api-key-file", "--insecure")
    server = start(tiny, "--host", "0.0.0.0", "--insecure")
    assert server.get("/health", headers={"host": "box.example"}).status_code == 200
    assert server.stop() == 0


def test_what_cannot_start_says_so(cli: Cli, start: Start, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    server = start(tiny)
    check_failure(cli("serve", tiny, "--port", server.port), 2, "cannot listen on 127.0.0.1", str(server.port))
    (tmp_path / "short").write_text("abc")
    check_failure(cli("serve", tiny, "--api-key-file", tmp_path / "short"), 2, "holds no key")
    check_failure(cli("serve", tiny, "--api-key-file", tmp_path / "none"), 2, "cannot be read")
    check_failure(cli("serve", tmp_path / "nothing", "--port", 0), 2)
    result = cli("serve", tiny, "--port", 0, "--budget-gb", 0.05)
    assert result.returncode == 1
    assert "is too small" in result.stderr
    assert "Traceback" not in result.stderr
