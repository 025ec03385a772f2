"""The page at `/`: one file, and what the browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def page() -> Response:
    """Its own script and style run, nothing else does; it asks nobody but this server."""
    text = FILE.read_text(encoding="utf-8")
    script, style = (_digest(text, name) for name in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(text, media_type="text/html", headers={"Content-Security-Policy": policy})


def _digest(text: str, name: str) -> str:
    found = re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
    assert found
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
