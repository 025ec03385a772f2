# The extension is called by the wrappers of this package only, which check what it is given.
from typing import Any

def __getattr__(name: str) -> Any: ...
