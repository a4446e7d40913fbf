"""Parts of networks: backbones, prompts, taps, heads.

Importing this package makes ``import timm`` work beside a CPU-only torch; see ``torchvision_ops``.
"""

from __future__ import annotations

from limbeck.nets.torchvision_ops import declare_missing_ops

declare_missing_ops()
