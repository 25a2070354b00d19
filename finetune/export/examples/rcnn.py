from finetune.export.examples.fitted import prepared
from finetune.export.examples.start import FACTS, json, np, opened, run, sys

rows = []
for number, path in enumerate(sys.argv[1:], 1):
    image = opened(path)
    pixels, content = prepared(image)
    found = run(images=pixels, content=np.array([content]))
    boxes, scores, labels = (values[0] for values in found)
    boxes = boxes * ([image.width / content[1], image.height / content[0]] * 2)
    for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels, strict=True):
        if score > 0:
            category = FACTS["category_ids"][label - 1]
            row = {"image_id": number, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            rows.append(row)
print(json.dumps(rows))
