"""Tests and doctests see eight CPU devices of one thread each, and Keras on JAX."""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
