"""A picture of one line of text, made even for a reader of lines.

Pillow only: it runs in the child that decodes, and where readers are trained.
"""

from __future__ import annotations

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

__all__ = ["line"]

_NARROWEST = 16  # pixels
_CUTOFF = 0.5  # percent of the pixels at each end that may lose their difference
_AROUND = 4  # a pixel is compared with those within a line's height divided by this


def line(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Return `picture` in grey, of `height`, and as wide as it is then but at most `width`.

    Contrast is stretched to the whole range, and ink that is lighter than its ground becomes
    darker.
    """
    grey = picture.convert("L")
    own = round(grey.width * height / grey.height)
    size = min(width, max(_NARROWEST, own)), height
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    grey = ImageOps.autocontrast(grey, cutoff=_CUTOFF)
    return ImageOps.invert(grey) if _light_ink(grey) else grey


def _light_ink(grey: Image.Image) -> bool:
    """Whether ink is lighter than the ground around it.

    Of a line less than half is ink, so that ink differs more than ground from what is around it.
    Neighbours are compared, since a shadow is darker than ink elsewhere.
    """
    around = grey.filter(ImageFilter.BoxBlur(grey.height // _AROUND))
    lighter, darker = ImageChops.subtract(grey, around), ImageChops.subtract(around, grey)
    return ImageStat.Stat(lighter).sum2[0] > ImageStat.Stat(darker).sum2[0]
