# pandas' own annotations are unions that no working program satisfies (a column may be a date): seen as untyped.
from typing import Any

DataFrame: type[Any]
Series: type[Any]

def __getattr__(name: str) -> Any: ...
