"""ImageNet-R: renditions (art, cartoons, toys, ...) of 200 ImageNet classes."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.data.files import folder_splits
from limbeck.data.images import Dataset, Splits
from limbeck.data.roots import find, missing, roots
from limbeck.errors import DataError

_PROBE = "n01443537"  # goldfish, the first of the 200 classes
_CLASSES = 200


@dataclass(frozen=True, kw_only=True)
class ImageNetR(Dataset):
    """30,000 images of 200 classes (Hendrycks et al., ICCV 2021), one folder per WordNet id.

    The set has no official split. Continual learning papers hold 20 % out; so is done here, by class.
    Differs: those papers use one stored list of files, drawn once without regard to classes; a folder that
    is already parted into ``train/`` and ``test/`` is taken as it is, so that list can be reproduced.
    Differs: an image is read as its middle square of ``side`` pixels, then cropped from or scaled.

    Attributes:
        root: folder that holds ``imagenet-r/`` or the class folders; None = LIMBECK_DATA.
        side: pixels of the square that each image is read as.
        test_fraction: share of each class that is held out where there is no split.
        split_seed: fixes that split, apart from the run's seed.
    """

    root: str | None = None
    side: int = 256
    test_fraction: float = 0.2
    split_seed: int = 0

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        names = [f"{top}{part}{_PROBE}" for top in ("imagenet-r/", "") for part in ("train/", "")]
        probe = find(roots(self.root), names)
        if probe is None:
            raise missing(
                "ImageNet-R",
                "download imagenet-r.tar (2 GB) as github.com/hendrycks/imagenet-r says, unpack it, and set "
                "data.root or LIMBECK_DATA to the folder that holds imagenet-r/",
                "use any other image folder with data.name=folder",
            )
        root = probe.parents[1] if probe.parent.name == "train" else probe.parent
        splits = folder_splits(
            root,
            "ImageNet-R",
            side=self.side,
            licence="MIT (list and code); images from Flickr and others, research use",
            source="github.com/hendrycks/imagenet-r",
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
        )
        found = len(splits.train.classes)
        if found != _CLASSES:
            raise DataError(
                f"{root} has {found} class folders but ImageNet-R has {_CLASSES}: unpack it again"
            )
        return splits
