"""Compilers of machines that are not here: XLA:GPU, XLA:TPU and XLA:CPU on any host."""
