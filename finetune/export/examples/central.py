from finetune.export.examples.start import HOW, Image, np


def prepared(image):
    """Pixels [1, C, H, W] of the photo's centre, or of all of it in another shape."""
    (height, width), side, least = HOW["crop"], HOW["shorter_side"], min(image.size)
    high, wide = height, width
    if side is not None:
        high, wide = max(height, side * image.height // least), max(width, side * image.width // least)
    small = np.asarray(image.resize((wide, high), Image.Resampling[HOW["interpolation"].upper()]))
    top, left = round((high - height) / 2), round((wide - width) / 2)
    crop = small.reshape(high, wide, -1)[top : top + height, left : left + width]
    return crop.transpose(2, 0, 1)[None].astype(np.float32) / 255
