"""A run that kills a process of its own in the middle of training, and goes on.

partita run --processes 2 --devices 2 --plan dp --manage examples/lose_a_process.py
"""

import os
import signal

import keras
import numpy as np


class Kill(keras.callbacks.Callback):
    """Kills process 1 after its 13th batch, as a failing machine would."""

    batches = 0

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.batches += 1
        if self.batches == 13 and os.environ.get("JAX_PROCESS_ID") == "1":
            os.kill(os.getpid(), signal.SIGKILL)


keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(256, 32)).astype("float32")
y = x[:, :1] * x[:, 1:2]
model = keras.Sequential(
    [keras.Input((32,)), keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(1)]
)
model.compile("adam", "mse")
kill = Kill()
history = model.fit(x, y, batch_size=32, epochs=3, verbose=0, callbacks=[kill])
print(
    f"{kill.batches} batches; loss of each epoch:", *(f"{v:.4f}" for v in history.history["loss"])
)
