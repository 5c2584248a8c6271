"""Data: integer images and honest augmentation."""

from scoresde.data.augment import LABELS, augmented
from scoresde.data.images import SPLITS, Images, digits, load_images

__all__ = ["LABELS", "SPLITS", "Images", "augmented", "digits", "load_images"]
