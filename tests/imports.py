"""What the processes of tests/forks.py would import one by one; no module that is run with `python -m`."""

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import finetune.run  # noqa: F401
import pretrain.run  # noqa: F401
