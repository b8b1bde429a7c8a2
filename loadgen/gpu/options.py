"""What all GPU benchmarks are told on the command line: the device, the weights' type, and how often to measure."""

import argparse

import torch

from loadgen.refusal import WrongArgument

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that they have in common."""
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="readings of each (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="calls before them (default %(default)s)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="(default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default %(default)s)")


def check_counts(options: argparse.Namespace) -> None:
    """Raises WrongArgument."""
    for name, least in (("repeats", 1), ("warm_up", 0)):
        if getattr(options, name) < least:
            raise WrongArgument(f"--{name.replace('_', '-')} {getattr(options, name)}: give {least} or more")


def chosen_device(name: str) -> torch.device:
    """The device of that name. Raises WrongArgument."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise WrongArgument(f"--device {name}: give cuda, cuda:1, ... or cpu") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise WrongArgument(f"--device {name}: give cuda, cuda:1, ... or cpu")
    if not torch.cuda.is_available():
        raise WrongArgument(
            "torch sees no GPU here, so that nothing was measured; on a machine with one, install a torch that is "
            "built for it (--device cpu takes the same way on a CPU; gpu and gpu-llm then want --tiny too)"
        )
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise WrongArgument(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    torch.cuda.set_device(device)
    return device
