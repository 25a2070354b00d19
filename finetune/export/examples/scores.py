from finetune.export.examples.start import ANSWER, FACTS, np


def probabilities(logits):
    """Of the classes, [..., K]."""
    if ANSWER["scores"] == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True))[..., : len(FACTS["classes"])]
