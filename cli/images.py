"""Pictures in and out: files to tensors, tensors to pictures."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import CommandError, line

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
WHITE = (255, 255, 255, 255)


def decoded(data: bytes, name: str) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP, upright, as RGB or L; transparency is composited on white.

    Raises CommandError for data that is damaged, of another format, or of more than 64 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise CommandError(f"{name} is {picture.width} x {picture.height}: pictures have up to 64 megapixels")
            picture = ImageOps.exif_transpose(picture)
            picture.load()
            return opaque(picture)
    except CommandError:
        raise
    except UnidentifiedImageError as e:
        raise CommandError(f"{name} is not a readable PNG, JPEG or WebP picture (it begins with {data[:8]!r})") from e
    except Exception as e:  # what Pillow raises for a damaged file is anything
        raise CommandError(f"{name} is not a readable PNG, JPEG or WebP picture ({line(e)[:80]})") from e


def opaque(picture: Image.Image) -> Image.Image:
    """Any mode as RGB, or L where there is no colour."""
    if picture.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("1", "L"):
        return picture.convert("L")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB")


def fitted(picture: Image.Image, side: int, name: str, resize: bool = True) -> Image.Image:
    """Centre-cropped to a square and resized to side x side, bilinear with antialiasing, as both papers do."""
    if picture.size == (side, side):
        return picture
    if not resize:
        raise CommandError(f"{name} is {picture.width} x {picture.height}, the network takes {side} x {side}: "
                           "resize it, or leave out --no-resize")  # fmt: skip
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge))
    return square.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=None)


def filled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cropped about its centre to the proportions of `size`, (height, width), and resized to it, bilinear."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    across, down = width / scale, height / scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + across, picture.width), min(top + down, picture.height))
    return (
        picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR, box)
    )


def to_tensor(picture: Image.Image, channels: int) -> Tensor:
    """A picture -> (C, H, W) in [-1, 1], float32."""
    if channels not in (1, 3):
        raise CommandError(f"the network takes {channels} channels; pictures have 1 or 3")
    pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).float() / 127.5 - 1


def to_mask(picture: Image.Image) -> Tensor:
    """A picture -> (1, H, W) in [0, 1]: white is where."""
    return torch.from_numpy(np.array(picture.convert("L")))[None].float() / 255


def to_picture(x: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] -> RGB (or L, for one channel), rounded to 8 bits.  Raises CommandError for NaN."""
    if not bool(torch.isfinite(x).all()):
        raise CommandError("the result is not finite: try --dtype float32, fewer extreme settings, or other weights")
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[:, :, :3]))
