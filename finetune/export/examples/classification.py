from finetune.export.examples.central import prepared
from finetune.export.examples.scores import probabilities
from finetune.export.examples.start import ANSWER, FACTS, json, np, opened, run, sys

rows = []
for path in sys.argv[1:]:
    found = probabilities(run(images=prepared(opened(path)))[0])[0]
    order = np.argsort(-found, kind="stable")
    likely = {FACTS["classes"][i]: float(found[i]) for i in order}
    best = order[:1] if ANSWER["threshold"] is None else [i for i in order if found[i] >= ANSWER["threshold"]]
    rows.append({"file": path, "classes": [FACTS["classes"][i] for i in best], "probabilities": likely})
print(json.dumps(rows))
