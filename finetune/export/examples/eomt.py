from finetune.export.examples.fitted import prepared
from finetune.export.examples.runs import run_lengths
from finetune.export.examples.scores import probabilities
from finetune.export.examples.start import ANSWER, FACTS, Image, json, np, opened, run, sys


def resized(values, size):
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))


rows = []
for number, path in enumerate(sys.argv[1:], 1):
    image = opened(path)
    pixels, content = prepared(image)
    masks, logits = (values[0] for values in run(images=pixels))
    scores = probabilities(logits)
    best = np.argsort(-scores, axis=None, kind="stable")[: ANSWER["most"]]
    for query, label in zip(*np.divmod(best, scores.shape[1]), strict=True):
        mask = resized(resized(masks[query], pixels.shape[:1:-1])[: content[0], : content[1]], image.size)
        inside = mask > 0
        if not inside.any():
            continue
        score = float(scores[query, label] * (1 / (1 + np.exp(-mask[inside]))).mean())
        across, down = np.flatnonzero(inside.any(0)).tolist(), np.flatnonzero(inside.any(1)).tolist()
        box = [across[0], down[0], across[-1] + 1 - across[0], down[-1] + 1 - down[0]]
        row = {"image_id": number, "category_id": FACTS["category_ids"][label], "bbox": box, "score": score}
        rows.append(row | {"segmentation": run_lengths(inside)})
print(json.dumps(sorted(rows, key=lambda row: (row["image_id"], -row["score"]))))
