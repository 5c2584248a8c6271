"""Data: integer images and honest augmentation."""

from scoresde.data.augment import AUGMENTATION_DIM, augmented
from scoresde.data.images import SPLITS, Images, digits, load_images

__all__ = ["AUGMENTATION_DIM", "SPLITS", "Images", "augmented", "digits", "load_images"]
