"""APT: additive vectors and their running average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prompts.apt import APT


def build(**fields: Any) -> Any:
    return APT(**fields).build(24, 24, 3, 3, torch.Generator().manual_seed(0))


def test_running_average_over_tasks() -> None:
    module, query = build(), torch.zeros(2, 0)
    assert torch.equal(module.eval()(query).additive[1][0], module.prompts[1, 0])
    first = module.prompts.detach().clone()
    module.finish_task()
    module.finish_task()
    assert torch.equal(module.average, first)
    module.start_task(1, torch.Generator())
    assert torch.equal(module.prompts, first)
    with torch.no_grad():
        module.prompts.add_(1.0)
    assert torch.equal(module.train()(query).additive[0][1], module.prompts[0, 1])
    assert torch.equal(module.eval()(query).additive[0][1], first[0, 1])
    module.finish_task()
    assert torch.allclose(module.average, 0.7 * first + 0.3 * (first + 1))
    module.finish_task()
    assert torch.allclose(module.average, first + 0.3)


def test_loading_restores_what_was_merged() -> None:
    module, other = build(), APT().build(24, 24, 3, 3, torch.Generator().manual_seed(7))
    module.finish_task()
    module.start_task(1, torch.Generator())
    other.load_state_dict(module.state_dict())
    assert (other.merged, other.task) == (1, 1)
    other.finish_task()
    assert other.merged == 2


def test_reaches_the_class_token_alone(net: Any, batch: Any) -> None:
    student = net(APT(std=0.5, blocks=(2,)))
    plain = student.backbone.forward_features(batch().inputs)
    tokens = student.train()(batch(), taps=("norm",)).features["norm"]
    assert tokens.shape == plain.shape
    assert not torch.allclose(tokens, plain, atol=1e-3)


def test_head_is_normalised(net: Any, batch: Any) -> None:
    student = net(APT())
    said = student(batch(), taps=("norm",))
    normed = F.layer_norm(said.features["norm"][:, 0], (24,))
    want = normed @ F.normalize(student.head.weight, dim=1).T + student.head.bias
    assert torch.allclose(said.logits, want, atol=1e-5)


def test_what_does_not_fit(net: Any, vit: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep is 1\.5"):
        APT(keep=1.5)
    with pytest.raises(ShapeError, match="need a class token"):
        net(APT(), vit=vit(class_token=False, global_pool="avg"))
