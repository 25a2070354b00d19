from finetune.export.examples.start import HOW, Image, np


def prepared(image):
    """Pixels [1, C, H, W] with the photo at the top left, as large as fits, and its (height, width) in them."""
    ratio = min(HOW["fit"][0] / image.height, HOW["fit"][1] / image.width)
    content = max(round(image.height * ratio), 1), max(round(image.width * ratio), 1)
    pixels = np.tile(np.array(HOW["fill"], np.uint8), (*HOW["canvas"], 1))
    small = np.asarray(image.resize(content[::-1], Image.Resampling.BILINEAR))
    pixels[: content[0], : content[1]] = small.reshape(*content, -1)
    return pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255, content
