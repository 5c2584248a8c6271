"""Non-leaky augmentation: changed images come with a label that says how, so the likelihood of unchanged ones is honest.

Layer 4. The network is conditioned on the change (Karras et al. 2022, appendix F.2; Jun et al. 2020): label 0 is the
data's own distribution, which is what is sampled and scored; the other labels only teach.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoresde.rng import derive

AUGMENTATION_DIM = 8  # changed at all, shift y and x, rotation, shear, log-scale x and y, whole-pixel shift
_SPREAD = np.array([0.12, 0.12, 0.08, 0.08])


def augmented(values: Tensor, levels: int, *, copies: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Changed copies of integer images (N, c, h, w) and their labels.

    Per image: the four shifts by one pixel, and `copies` random affine maps (rotation and shear of 0.12 rad, scales of
    8 %, shifts within half a pixel; cubic interpolation, rounded back to levels). Returns values
    (N (4 + copies), c, h, w) and labels (N (4 + copies), 8), float32.
    """
    from scipy.ndimage import affine_transform, shift

    rng = np.random.default_rng(derive(seed, 0xA06))
    images = values.numpy().astype(np.float64)
    n, _, height, width = images.shape
    out, labels = [], []
    for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        out.append(shift(images, (0, 0, dy, dx), order=0))
        label = np.zeros((n, AUGMENTATION_DIM))
        label[:, [0, 1, 2, 7]] = 1.0, dy, dx, 1.0
        labels.append(label)
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    for _ in range(copies):
        moved = np.empty_like(images)
        label = np.zeros((n, AUGMENTATION_DIM))
        label[:, 0] = 1.0
        for i, image in enumerate(images):
            z, move = rng.normal(size=4), rng.uniform(-0.5, 0.5, 2)
            angle, shear, scale_x, scale_y = z * _SPREAD
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            matrix = rotation @ np.array([[1, 0], [shear, 1]]) @ np.diag(np.exp([scale_y, scale_x]))
            offset = centre - matrix @ centre + move
            for c, plane in enumerate(image):
                moved[i, c] = affine_transform(plane, matrix, offset=offset, order=3)
            label[i, 1:3], label[i, 3:7] = move, z
        out.append(moved)
        labels.append(label)
    changed = np.clip(np.rint(np.concatenate(out)), 0, levels - 1).astype(np.int64)
    return torch.from_numpy(changed), torch.from_numpy(np.concatenate(labels)).float()
