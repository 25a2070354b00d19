from finetune.export.examples.start import np


def run_lengths(inside):
    """A mask bool [H, W] as COCO's uncompressed run lengths."""
    column = inside.flatten("F")
    changes = np.flatnonzero(np.diff(column, prepend=False))
    return {"size": inside.shape, "counts": np.diff(np.concatenate([[0], changes, [len(column)]])).tolist()}
