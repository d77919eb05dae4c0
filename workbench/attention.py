"""Looking inside the attention function, where no module begins or ends.

Hugging Face's fused attention gives neither scores nor pattern. While sites inside it are wanted, the model is switched to
Hugging Face's own eager attention (never to a function of ours, with which the causal mask is silently lost unless a mask
function is registered too), and the two calls that make the pattern are watched as they happen: the product of queries and
keys, and the softmax. So every family's own scaling, soft cap, mask, sinks and position bias are in what is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

INSIDE = ("q_rot", "k_rot", "attn_scores", "pattern")
"""Sites inside the attention function, in the order in which they come."""

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_BATCHED = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class Watch(TorchFunctionMode):
    """Hands the tensors at the sites inside one attention module to their edits while the module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.edits: dict[str, list[Callable[[Tensor], Tensor]]] = {name: [] for name in INSIDE}
        self._before_product = True

    def start(self, *_: Any) -> None:
        """A hook for the moment before the module's forward."""
        self._before_product = True
        self.__enter__()

    def stop(self, *_: Any) -> None:
        """A hook for the moment after it, also when it failed."""
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            scores, *rest = args
            return self._edited("pattern", func(self._edited("attn_scores", scores), *rest, **kwargs))
        if self._before_product and func in _PRODUCTS and args[1].dim() > 2:  # two axes: a linear layer written as a product
            self._before_product = False
            return func(self._edited("q_rot", args[0]), self._edited("k_rot", args[1]), *args[2:], **kwargs)
        if self._before_product and func in _BATCHED:
            self._before_product = False
            kwargs |= {"batch1": self._edited("q_rot", kwargs["batch1"]), "batch2": self._edited("k_rot", kwargs["batch2"])}
        return func(*args, **kwargs)

    def _edited(self, name: str, value: Tensor) -> Tensor:
        for edit in self.edits[name]:
            value = edit(value)
        return value


@contextmanager
def eager(backbone: nn.Module) -> Iterator[None]:
    """Hugging Face's eager attention in every module of the backbone while open; what was set before is set again after."""
    configs: dict[int, Any] = {id(m.config): m.config for m in backbone.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
