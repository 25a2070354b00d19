from finetune.export.examples.fitted import prepared
from finetune.export.examples.runs import run_lengths
from finetune.export.examples.start import FACTS, Image, json, np, opened, run, sys


def pasted(mask, box, size):
    """The probabilities [28, 28] of a box as a mask bool [H, W] of the photo."""
    across, down = len(mask) / (box[2] - box[0]), len(mask) / (box[3] - box[1])
    place = (across, 0, 1 - box[0] * across, 0, down, 1 - box[1] * down)
    full = Image.fromarray(np.pad(mask, 1)).transform(size, Image.Transform.AFFINE, place, Image.Resampling.BILINEAR)
    return np.asarray(full) >= 0.5


rows = []
for number, path in enumerate(sys.argv[1:], 1):
    image = opened(path)
    pixels, content = prepared(image)
    found = run(images=pixels, content=np.array([content]))
    boxes, scores, labels, masks = (values[0] for values in found)
    boxes = (boxes * ([image.width / content[1], image.height / content[0]] * 2)).tolist()
    for i in np.flatnonzero(scores):
        x1, y1, x2, y2 = boxes[i]
        row = {"image_id": number, "category_id": FACTS["category_ids"][labels[i] - 1], "score": float(scores[i])}
        row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": run_lengths(pasted(masks[i], boxes[i], image.size))}
        rows.append(row)
print(json.dumps(rows))
