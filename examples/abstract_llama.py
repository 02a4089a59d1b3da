"""Plans the training of a transformer with 8 billion parameters for eight H200s, without allocating
one of them.

    python examples/abstract_llama.py
    python examples/abstract_llama.py --machine dgx-h200:16 --batch 128 --save llama.json
"""

import argparse
import os
import resource
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
from keras import layers

import partita
from partita.units import format_bytes, format_seconds


def llama(
    width=4096, blocks=32, heads=32, hidden=14336, vocabulary=128256, length=2048
) -> keras.Model:
    """A transformer of the Llama 3 8B shape: grouped queries, gated dense layers, no rotary
    positions.
    """
    tokens = keras.Input((length,), dtype="int32")
    h = layers.Embedding(vocabulary, width, name="embedding")(tokens)
    for i in range(blocks):
        a = layers.RMSNormalization(name=f"norm_a{i}")(h)
        attention = layers.GroupQueryAttention(
            width // heads, heads, 8, use_bias=False, name=f"attention{i}"
        )
        h = h + attention(a, a, use_causal_mask=True)
        b = layers.RMSNormalization(name=f"norm_b{i}")(h)
        gate = layers.Dense(hidden, activation="silu", use_bias=False, name=f"gate{i}")(b)
        up = layers.Dense(hidden, use_bias=False, name=f"up{i}")(b)
        h = h + layers.Dense(width, use_bias=False, name=f"down{i}")(gate * up)
    h = layers.RMSNormalization(name="norm")(h)
    return keras.Model(
        tokens, layers.Dense(vocabulary, use_bias=False, name="logits")(h), name="llama"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="h200:8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--save")
    arguments = parser.parse_args()

    start = time.perf_counter()
    keras.config.set_dtype_policy("mixed_bfloat16")
    with partita.abstract():
        model = llama()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plan = partita.plan(model, batch_size=arguments.batch, machine=arguments.machine)
    seconds = time.perf_counter() - start

    lines = str(plan).splitlines()
    print(*lines[:9], f"  ... {len(lines) - 15} lines ...", *lines[-6:], sep="\n")
    tokens = arguments.batch * model.inputs[0].shape[1]
    print(
        f"{model.count_params():,} parameters; {tokens / plan.predicted['seconds']:,.0f} tokens a second predicted"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"model, capture and search took {format_seconds(seconds)} and {format_bytes(peak)} of this process's memory"
    )
    if arguments.save:
        plan.save(arguments.save)


if __name__ == "__main__":
    main()
