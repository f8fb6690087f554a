"""Pictures as CLIP's vision tower takes them: resized, cropped or squashed, normalised."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021


def clip_pixels(image: Image.Image, size: int = 224, *, squash: bool = False) -> Tensor:
    """A picture -> (1, 3, size, size), float32: bicubic, the short side to `size`, then the middle square.

    `squash` resizes both sides instead and loses no border.  Rounding to 8 bits comes before normalising.
    """
    image = image.convert("RGB")
    width, height = image.size
    if squash:
        width = height = size
    elif width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
