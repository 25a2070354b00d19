"""Which tasks `finetune.export` can turn into a graph, for messages."""

EXPORTABLE = "exportable tasks: classification, segmentation, depth, and detection with head detr or eomt"
