from finetune.export.examples.fitted import prepared
from finetune.export.examples.scores import probabilities
from finetune.export.examples.start import ANSWER, FACTS, json, np, opened, run, sys

rows = []
for number, path in enumerate(sys.argv[1:], 1):
    image = opened(path)
    pixels, content = prepared(image)
    boxes, logits = (values[0] for values in run(images=pixels))
    scores = probabilities(logits)
    size = np.array([image.width, image.height])
    scale = np.array(pixels.shape[:1:-1]) * size / content[::-1]
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    corners = np.clip(corners * np.tile(scale, 2), 0, np.tile(size, 2))
    best = np.argsort(-scores, axis=None, kind="stable")[: ANSWER["most"]]
    for query, label in zip(*np.divmod(best, scores.shape[1]), strict=True):
        x1, y1, x2, y2 = corners[query].tolist()
        row = {"image_id": number, "category_id": FACTS["category_ids"][label], "score": float(scores[query, label])}
        rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
print(json.dumps(rows))
