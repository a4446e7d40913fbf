"""What a timm folder's ``config.json``, or a recipe, may say of a network, checked before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import timm
from pydantic import BaseModel, Field, ValidationError

from limbeck.errors import ConfigError

Whole = Annotated[int, Field(ge=1, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
RESERVED = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"}
"""What ``timm.create_model`` takes for itself: some of it reads files that may run code."""


class Form(BaseModel):
    """The parts of a description and of the arguments that limbeck reads itself."""

    input_size: tuple[Whole, Whole, Whole] | None = None
    mean: tuple[Finite, ...] | None = None
    std: tuple[Finite, ...] | None = None
    classifier: str | tuple[str, ...] | None = None
    in_chans: Whole = 1
    img_size: Whole | tuple[Whole, Whole] = 1


def check_form(cfg: Any, model_args: Any, where: str) -> None:
    """Raise unless a network's description and arguments are maps of what they should hold.

    Args:
        cfg: timm's description of pretrained weights.
        model_args: arguments of the network.
        where: what said so, for the message.

    Raises:
        ConfigError: they are not, or the arguments are not the network's own.
    """
    for name, value in (("pretrained_cfg", cfg), ("model_args", model_args)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} of {where} is {value!r} but must be a map")
    taken = sorted(RESERVED & set(model_args))
    if taken:
        raise ConfigError(
            f"model_args of {where} has {taken[0]!r}, which is no argument of a network: drop it"
        )
    try:
        Form.model_validate({**cfg, **model_args})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{problem['loc'][0]} of {where} is {problem['input']!r}: {problem['msg'].lower()}"
        ) from error
