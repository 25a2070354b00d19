from finetune.export.examples.start import HOW, Image, np, run


def averaged(image):
    """The graph's output on a photo, [K] maps of the photo's own size: the mean of overlapping windows."""
    factor = HOW["shorter_side"] / min(image.size) if HOW["shorter_side"] else 1
    size = max(round(image.height * factor), 1), max(round(image.width * factor), 1)
    small = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, -1)
    pixels = small.transpose(2, 0, 1).astype(np.float32) / 255
    high, wide = (min(pair) for pair in zip(HOW["window"] or size, size, strict=True))
    down, across = HOW["steps"] or size
    tops = [min(top, size[0] - high) for top in range(0, size[0] - high + down, down)]
    lefts = [min(left, size[1] - wide) for left in range(0, size[1] - wide + across, across)]
    canvas = HOW["canvas"] if HOW["fixed"] else (high + -high % HOW["patch"], wide + -wide % HOW["patch"])
    part, found = np.tile(np.array(HOW["mean"], np.float32)[None, :, None, None], (1, 1, *canvas)), {}
    for y, x in [(top, left) for top in tops for left in lefts]:
        part[0, :, :high, :wide] = pixels[:, y : y + high, x : x + wide]
        found[y, x] = run(images=part)[0][0, :, :high, :wide]
    total, count = np.zeros((len(found[0, 0]), *size), np.float32), np.zeros(size, np.float32)
    for (y, x), values in found.items():
        total[:, y : y + high, x : x + wide] += values
        count[y : y + high, x : x + wide] += 1
    return [np.asarray(Image.fromarray(one).resize(image.size, Image.Resampling.BILINEAR)) for one in total / count]
