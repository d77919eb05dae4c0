# plotly's own annotations are unions that no working program satisfies (an indexed frame may be a date): seen as untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
