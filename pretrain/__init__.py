"""Self-supervised pretraining of vision transformers on sharded images."""
