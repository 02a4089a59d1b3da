"""Every test sees eight virtual CPU devices of one thread each, whatever it imports first."""

import os

os.environ["KERAS_BACKEND"] = "jax"
# Machine code that compiles a third faster and runs slower; the partitioner is the same.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["PARTITA_CACHE"] = "/nonexistent"  # nothing that was measured on this machine
os.environ["NPROC"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
