# An extra, which the checker's environment does not have.
from typing import Any

class ActivationCache(Any): ...
