"""One process that makes videos without any stack, for comparison: ``python -m loadgen.in_process MODEL THREADS``.

It loads the model, writes one line ``ready``, then answers each JSON line on its standard input (the arguments of
``OpenSoraPipeline.generate``) with one JSON line: the seconds it took and the file's SHA-256.
"""

import hashlib
import json
import sys
import time
from typing import Any

import torch

from common.models.memory import keep_freed_memory
from common.models.mp4 import Mp4Encoder
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec


def make_video(pipeline: OpenSoraPipeline, arguments: dict[str, Any]) -> bytes:
    """The MP4 of one request, as a VAE worker would write it."""
    frames = pipeline.generate(**arguments).frames
    file = Mp4Encoder(frames.shape[2], frames.shape[1], arguments["fps"])
    file.add(frames)
    return file.finish()


def main(model: str, threads: int) -> None:
    """Answer until standard input closes."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    pipeline = OpenSoraPipeline(load_spec(model))
    print("ready", flush=True)
    for line in sys.stdin:
        started_s = time.perf_counter()
        data = make_video(pipeline, json.loads(line))
        seconds = time.perf_counter() - started_s
        print(json.dumps({"seconds": seconds, "sha256": hashlib.sha256(data).hexdigest()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
