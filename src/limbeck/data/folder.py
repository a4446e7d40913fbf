"""Any folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limbeck.data.files import folder_splits
from limbeck.data.images import Dataset, Splits
from limbeck.data.roots import roots
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Folder(Dataset):
    """Images in one sub-folder per class, under ``train/`` and ``test/`` (or ``val/``) or without a split.

    Attributes:
        root: the folder; None = the first of LIMBECK_DATA.
        label: name that figures carry; None = the folder's name.
        side: pixels of the square that each image is read as: its middle, scaled.
        test_fraction: share of each class that is held out where the folder has no split.
        split_seed: fixes that split, apart from the run's seed.
    """

    root: str | None = None
    label: str | None = None
    side: int = 256
    test_fraction: float = 0.2
    split_seed: int = 0

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        folders = [folder for folder in roots(self.root) if folder.is_dir()]
        if not folders:
            raise ConfigError("data.root is not given: name a folder with one sub-folder of images per class")
        root = Path(folders[0]).resolve()
        return folder_splits(
            root,
            self.label or root.name,
            side=self.side,
            licence="that of the folder's owner",
            source="image folder",
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
        )
