"""A 12-block GPT planned for machines that are not here: seconds of capture, search, compilation.

    python benchmarks/absent.py                            # h100:8, half a minute
    python benchmarks/absent.py --machine tpu-v5e:8 --compile
    python benchmarks/absent.py --blocks 1 --width 64      # small

Mixed bfloat16, 12 blocks of 768 features, 12 heads, 1024 tokens, 32,768 words, 64 samples; the model
has no allocated weights. `CPU` counts the processor time of this process, which other programs on
the host do not lengthen. The compiler runs in a process of its own; its time is wall time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import keras
from keras import layers

import partita
from partita.planning import search_plan

HEAD_SIZE = 64
WORDS = 32768


def gpt(blocks: int, width: int, tokens: int) -> keras.Model:
    """A GPT."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    words = keras.Input((tokens,), dtype="int32")
    positions = keras.ops.arange(tokens)[None]
    x = layers.Embedding(WORDS, width)(words) + layers.Embedding(tokens, width)(positions)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(width // HEAD_SIZE, HEAD_SIZE)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
    logits = layers.Dense(WORDS, dtype="float32")(layers.LayerNormalization()(x))
    return keras.Model(words, logits, name="gpt")


class Clock:
    """Prints the time of each part of the work."""

    def __init__(self) -> None:
        self.wall = time.perf_counter()
        self.processor = time.process_time()

    def show(self, part: str) -> None:
        """Prints the seconds since the last call."""
        wall, processor = time.perf_counter(), time.process_time()
        seconds = f"{wall - self.wall:6.2f} s, CPU {processor - self.processor:6.2f} s"
        print(f"{part:28} {seconds}", flush=True)
        self.wall, self.processor = wall, processor


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="h100:8")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="compile the plan")
    given = parser.parse_args()
    machine = partita.load_machine(given.machine)
    clock = Clock()
    with partita.abstract():
        model = gpt(given.blocks, given.width, given.tokens)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clock.show("model")
    captured = partita.capture_program(model, given.batch, target=machine.target)
    clock.show("capture")
    result = search_plan(captured, machine)
    clock.show("search")
    kernels = sum(i.name == "fused_attention" for i in captured.graph.instructions)
    print(
        f"plan '{result.plan.name}', {' x '.join(str(a.size) for a in result.plan.mesh.axes)} devices; {kernels} calls of fused attention"
    )
    if given.compile:
        compiled = partita.compile_for(result.plan, captured, machine=machine)
        print(f"compiled in {compiled.compile_seconds:.1f} s; {compiled}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
