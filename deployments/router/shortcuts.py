"""The way through a transformers model made shorter, without touching what it computes: same operators, same order.

A decode step of a small model is a few hundred operators of 1 to 5 us, and between them Python looks things up. Once
the model will not change any more (no hooks, no training, no moved weights) the answers are known:

    module.child, module.weight    nn.Module finds them by a failed lookup and a search of three dictionaries
    module.child(x)                nn.Module asks for seven kinds of hooks
    module.config.key              PreTrainedConfig maps every name through a table, at every access

Norms and gates are the exception, where other operators give the same bits: substitutes.py. Knows no model class.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel


class _Straight(partial[Any]):
    """A module as its parent sees it: a call is its `forward`; whatever else is asked of it, the module answers."""

    module: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def _class(self) -> type:
        return type(self.__dict__["module"])

    # Models ask `isinstance(self.mlp, ...)`.
    __class__ = cast(Any, property(_class))


def _straight(module: nn.Module) -> _Straight:
    straight = _Straight(module.forward)
    straight.module = module
    return straight


class _PlainConfig:
    """A configuration whose values are plain attributes; what is no plain value is asked of the original."""

    def __init__(self, config: Any) -> None:
        self.__dict__.update(vars(config))
        self.__dict__["_original"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_original":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._original, name)


def shorten(model: nn.Module) -> None:
    """Put children, weights and configurations where Python finds them first. `model` must not change afterwards."""
    plain: dict[int, _PlainConfig] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and not isinstance(module, PreTrainedModel) and not isinstance(config, _PlainConfig):
            module.__dict__["config"] = plain.setdefault(id(config), _PlainConfig(config))
        # Not the buffers: a model may register one again while it runs, as dynamic rotary embeddings do.
        module.__dict__.update(module._parameters)
        for name, child in module._modules.items():
            if child is not None:
                module.__dict__[name] = _straight(child) if _only_forward(child) else child


def _only_forward(module: nn.Module) -> bool:
    """Whether calling the module does nothing but `forward`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        not any(hooks)
        and type(module).__call__ is nn.Module.__call__
        and not isinstance(module, PreTrainedModel | nn.ModuleList | nn.ModuleDict)
    )
