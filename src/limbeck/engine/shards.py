"""Networks whose blocks are shared out among ranks: torch's ``fully_shard``, by block.

Each rank holds a part of every block's weights, gradients and optimiser state, and has a whole block only
while it runs. What stands outside blocks (embeddings, heads) is whole on every rank. State goes in and comes
out as whole tensors, so that checkpoints, hashes and saved students are those of a network on one rank; all
ranks must ask for it together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from limbeck.contracts import Net
from limbeck.engine.ranks import Ranks
from limbeck.errors import ConfigError
from limbeck.nets.prefix import PROMPTED, own_method, promptable

MARK = "_limbeck_whole"  # a block's whole state, kept where it is asked for by one rank alone


def share_out(net: Net, who: str, ranks: Ranks, device: torch.device) -> None:
    """Share the blocks of ``net`` out among the ranks; alone or where they are, nothing happens.

    Raises:
        ConfigError: it has no blocks, or runs parts of their weights.
    """
    if ranks.size == 1 or is_shared(net):
        return
    found = list(blocks(net))
    if not found:
        raise ConfigError(
            f"engine.shard names the {who}, but {type(net).__name__} has no blocks that always run whole: "
            "leave it whole"
        )
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in found:
        prompts = promptable(block)
        block.register_forward_hook(_no_view)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if prompts:
            own_method(block)
            register_fsdp_forward_method(block, PROMPTED)
        block.register_state_dict_post_hook(_give_whole)  # type: ignore[no-untyped-call]
        block.register_load_state_dict_pre_hook(_take_whole)  # type: ignore[no-untyped-call]


def is_shared(module: nn.Module) -> bool:
    """Whether ranks share some of it, so that all of them must ask it together."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts that stand in a list or a sequence and have weights, of a network within another
    its own (``Net.sharable``).

    A single layer is none: it may be a classifier, whose weight others read.
    """
    body = module.sharable() if isinstance(module, Net) else module
    for child in () if body is None else body.children():
        if not isinstance(child, nn.ModuleList | nn.Sequential):
            yield from blocks(child)
            continue
        for part in child:
            if isinstance(part, Net):
                yield from blocks(part)
            elif next(part.children(), None) is not None and next(part.parameters(), None) is not None:
                yield part


def settle(module: nn.Module) -> None:
    """Let every rank hold its own part alone, as an optimiser must see it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def keep_whole(module: nn.Module) -> None:
    """Gather the state once more; from then on it is there without the other ranks."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            setattr(part, MARK, part.state_dict())


def whole(tree: Any) -> Any:
    """A tree of state whose shared tensors are whole, on the CPU."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def take_part(optimizer: torch.optim.Optimizer) -> None:
    """Let each rank keep its part of a whole state that was loaded."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if value.shape == parameter.shape and not isinstance(value, DTensor):
                    state[name] = _like(value, parameter)


def clip(parameters: Iterable[Tensor], limit: float, size: Tensor) -> None:
    """Scale gradients whose norm ``size`` is above ``limit`` down to it."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        parts[isinstance(parameter, DTensor)].append(parameter)
    for part in parts.values():
        nn.utils.clip_grads_with_norm_(part, limit, size)


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all ``tensors`` together, a scalar."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for tensor in tensors:
        parts[isinstance(tensor, DTensor)].append(tensor)
    found = [nn.utils.get_total_norm(part) for part in parts.values() if part]
    plain = [value.full_tensor() if isinstance(value, DTensor) else value for value in found]
    return plain[0] if len(plain) == 1 else nn.utils.get_total_norm(plain)


def _no_view(_module: nn.Module, _given: Any, out: Any) -> Any:
    """``out`` with copies of what are views: written into, one would lose the hook that gathers the block."""
    return tree_map_only(Tensor, lambda x: x if x._base is None else x.clone(), out)


def _like(value: Tensor, parameter: DTensor) -> Tensor:
    found: Tensor = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return found


def _give_whole(module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
    kept = getattr(module, MARK, {})
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        state[name] = kept[own] if own in kept else whole(state[name])


def _take_whole(
    module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any, _strict: bool, *_lists: list[str]
) -> None:
    for name, parameter in module.named_parameters():
        value = state.get(prefix + name)
        if isinstance(parameter, DTensor) and value is not None and not isinstance(value, DTensor):
            state[prefix + name] = _like(value, parameter)
