"""The `fovea` command: the first word selects what runs. It imports only what that word needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output

USAGE = """usage: fovea COMMAND ...

  fovea data write FOLDER_OR_CSV OUT      photos to indexed shards (also: index, verify, show)
  fovea data dups SHARDS --out DIR        images that are there twice, or also in other shards (--against): leakage
  fovea data convert ANNOTATIONS OUT      YOLO, VOC, labelme, VIA, CVAT or Label Studio to COCO json or csv
  fovea pretrain init SHARDS --gpus N --hours H --out pretrain.yaml   a configuration for these images and this time
  fovea pretrain CONFIG [key=value ...]   pretrain, or resume, the run of a configuration
  fovea launch local N [finetune] CONFIG [...]   the same on N processes of this machine, restarted when one dies
  fovea launch hosts HOSTFILE [finetune] CONFIG [...]   the same on the machines of a hostfile, over ssh
  fovea launch slurm pretrain CONFIG [...]       as a SLURM job, requeued until it is done; status, logs, ...
  fovea launch check CONFIG [...]         find problems before a GPU is used; plan: time, memory on N nodes
  fovea release RUN OUT                   the run's backbone as a folder that timm loads (also: verify, seal)
  fovea probe RELEASE --train .. --val .. kNN and linear accuracy; an untrained network and raw pixels compared
  fovea embed MODEL SHARDS --out DIR      features of every image to disk; fovea search DIR IMAGE: the nearest ones
  fovea attention RELEASE_OR_RUN SHARDS --out DIR   which attention uses the image, and what freezing it costs
  fovea replay CAPTURE                    recompute a step with a non-finite loss: samples, module, precision
  fovea scale CONFIG --gpus N --batch-per-gpu B   the recipe for other hardware, by stated rules
  fovea doctor RUN                        whether it was learning; if not, why and since which step
  fovea report RUN [RUN ...]              the page of a pretraining run: curves, verdicts, pictures; compares several
  fovea finetune init TASK DATA --weights W --out task.yaml   a configuration for your data, with its reasons
  fovea finetune CONFIG [key=value ...]   classification, detection, segmentation or depth from any backbone
  fovea predict RELEASE_OR_RUN IMAGES... --out DIR   predictions of a fine-tuned task on images, with pictures
  fovea explain RUN_OR_RELEASE IMAGES...  where it looks, and whether that is true of it: maps, checks, a page
  fovea export RELEASE_OR_RUN OUT         torch.export, ONNX and int8 of a fine-tuned task, each checked
  fovea lab --faults all --trials N --out DIR   faults in real runs on this machine: what held, what did not

Each command has --help; where `fovea` is not on the PATH: python -m fovea COMMAND ...
"""


def _pretrain(arguments: list[str]) -> int:
    if arguments[:1] == ["init"]:
        from launch.init.pretrain import main as init

        return init(arguments[1:])
    from pretrain.__main__ import main

    return main(arguments)


def _data(arguments: list[str]) -> int:
    if arguments[:1] == ["convert"]:
        from finetune.data.convert.command import main as convert

        return convert(arguments[1:])
    if arguments[:1] == ["dups"]:
        from pretrain.data.duplicates.command import main as dups

        return dups(arguments[1:])
    from pretrain.data.__main__ import main

    return main(arguments)


def _release(arguments: list[str]) -> int:
    from pretrain.release import main

    return main(arguments)


def _probe(arguments: list[str]) -> int:
    from pretrain.probes.__main__ import main

    return main(arguments)


def _attention(arguments: list[str]) -> int:
    from finetune.attention.__main__ import main

    return main(arguments)


def _embed(arguments: list[str]) -> int:
    from finetune.embed.command import main

    return main(arguments)


def _search(arguments: list[str]) -> int:
    from finetune.embed.search import main

    return main(arguments)


def _replay(arguments: list[str]) -> int:
    from pretrain.nonfinite.replay import main

    return main(arguments)


def _scale(arguments: list[str]) -> int:
    from launch.plan.scale import main

    return main(arguments)


def _doctor(arguments: list[str]) -> int:
    from pretrain.online.examine import main

    return main(arguments)


def _report(arguments: list[str]) -> int:
    from pretrain.report.command import main

    return main(arguments)


def _finetune(arguments: list[str]) -> int:
    if arguments[:1] == ["init"]:
        from launch.init.finetune import main as init

        return init(arguments[1:])
    from finetune.__main__ import main

    return main(arguments)


def _predict(arguments: list[str]) -> int:
    from finetune.predict import main

    return main(arguments)


def _explain(arguments: list[str]) -> int:
    from finetune.explain.command import main

    return main(arguments)


def _export(arguments: list[str]) -> int:
    from finetune.export.command import main

    return main(arguments)


def _launch(arguments: list[str]) -> int:
    from launch.__main__ import main

    return main(arguments)


def _lab(arguments: list[str]) -> int:
    from launch.lab.command import main

    return main(arguments)


_OPTION_WITH_HOME = re.compile(r"^(?P<option>--[\w-]+=)(?P<path>~[\w.-]*/.*)$", re.DOTALL)


def _with_home(match: re.Match[str]) -> str:
    """`--option=~/path` with the path of the home, which bash does not expand after an equals sign."""
    return match["option"] + str(Path(match["path"]).expanduser())


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "data": _data,
    "pretrain": _pretrain,
    "launch": _launch,
    "release": _release,
    "probe": _probe,
    "embed": _embed,
    "search": _search,
    "attention": _attention,
    "doctor": _doctor,
    "report": _report,
    "replay": _replay,
    "scale": _scale,
    "finetune": _finetune,
    "predict": _predict,
    "explain": _explain,
    "export": _export,
    "lab": _lab,
}


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status (docs/exit_status.md). 2 for a wrong command or argument."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fovea {version('fovea')}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"fovea: unknown command {arguments[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    words = [_OPTION_WITH_HOME.sub(_with_home, word) for word in arguments[1:]]
    return run_command(f"fovea {arguments[0]}", lambda: command(words))


if __name__ == "__main__":
    sys.exit(main())
