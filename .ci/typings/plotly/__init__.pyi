# plotly types a subplot's row as a string and takes a number: seen as untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
