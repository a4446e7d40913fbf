"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["LIMBECK_TRUST"] = "tests,seven,ten,torch,no_such_package"  # whose code the tests' recipes run

# A busy machine is no failure, and the same commit gives the same verdict.
settings.register_profile("limbeck", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("limbeck")
