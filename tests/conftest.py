"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no failure, and the same commit gives the same verdict.
settings.register_profile("limbeck", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("limbeck")
