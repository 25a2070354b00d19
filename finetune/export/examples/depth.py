from finetune.export.examples.start import Image, Path, json, np, opened, sys
from finetune.export.examples.windows import averaged

rows = []
for path in sys.argv[1:]:
    metres = averaged(opened(path))[0]
    millimetres = (metres.clip(0, 65.535) * 1000).round().astype(np.uint16)
    Image.fromarray(millimetres).save(f"{Path(path).stem}.depth.png")  # in this folder
    low, median, high = np.quantile(metres, (0, 0.5, 1)).tolist()
    rows.append({"file": path, "metres": {"min": low, "median": median, "max": high}})
print(json.dumps(rows))
