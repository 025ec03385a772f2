# The extension is called by the wrappers of this package only.
from typing import Any

def __getattr__(name: str) -> Any: ...
