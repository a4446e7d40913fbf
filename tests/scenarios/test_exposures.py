"""Exposures of canaries as a run tells them."""

from __future__ import annotations

import pytest
import torch

from limbeck.scenarios import exposures
from limbeck.scenarios.exposures import canary_exposure


def test_no_exposure_is_above_what_the_space_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail of a fitted law promises any number of bits, and an endless one that no JSON holds."""
    sample = 40 + torch.randn(99, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told = {
        "secret": torch.cat([torch.zeros(1), sample]),
        "public": torch.cat([torch.full((1,), 40), sample]),
    }
    monkeypatch.setattr(exposures, "log_perplexities", lambda net, *_: told[net])
    readers = {name: (name, None) for name in told}
    found = canary_exposure(readers, "pin ######", "123456", torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert found["method"] == "extrapolated"
    assert found["secret"] == found["at_most"] == pytest.approx(19.93, abs=0.01)
    assert 0 < found["public"] < 3
