from finetune.export.examples.start import FACTS, Image, Path, json, np, opened, sys
from finetune.export.examples.windows import averaged

rows = []
for path in sys.argv[1:]:
    classes = np.stack(averaged(opened(path))).argmax(0).astype(np.uint8)
    Image.fromarray(classes).save(f"{Path(path).stem}.classes.png")  # in this folder: the number of the class
    shares = np.bincount(classes.flatten(), minlength=len(FACTS["classes"])) / classes.size
    rows.append({"file": path, "fraction": dict(zip(FACTS["classes"], shares.tolist(), strict=True))})
print(json.dumps(rows))
