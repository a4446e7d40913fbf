"""A network whose inner outputs are replaced while it runs: any ``nn.Module``, without touching its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from limbeck.errors import ShapeError
from limbeck.nets.taps import resolve

Edit = Callable[[Tensor], Tensor]


@contextmanager
def edited(module: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within the context, calls of ``module`` go on with ``edit(output)`` in place of a submodule's output.

    The submodules run as they are, in the mode that they are in, and gradients pass through them. What
    ``taps.capture`` gathers inside the context is the edited output, outside of it the submodule's own.

    Args:
        module: the network; nothing of it is changed.
        edits: by module path as for taps, a function from the submodule's output to what replaces it.

    Raises:
        ShapeError: a path that is not there, or a submodule whose output is not one tensor.
    """
    with ExitStack() as hooks:
        for path, edit in edits.items():
            hook = module.get_submodule(resolve(module, path)).register_forward_hook(_replace(edit, path))
            hooks.callback(hook.remove)
        yield


def _replace(edit: Edit, path: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ShapeError(
                f"{path!r} gives a {type(output).__name__}, not one tensor: edit a submodule of it"
            )
        return edit(output)

    return hook
