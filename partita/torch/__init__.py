"""PyTorch modules, trained over several devices by a plan.

>>> step = partita.torch.parallelize(module, loss, optimizer)        # doctest: +SKIP
>>> for batch in loader:                                             # doctest: +SKIP
...     value = step(batch)
>>> module.load_state_dict(step.state_dict())                        # doctest: +SKIP

The module becomes a JAX function through torchax (`module`, `environment`), its optimizer becomes
Optax's (`optimizers`), and the training step is captured, planned and run like any other (`step`).
The price: the forward pass must be traceable, without branches on values of tensors.

The packages of the extra are imported at their first use (`extra`).
"""

from partita.torch.step import TrainingStep, parallelize, training_step

__all__ = ["TrainingStep", "parallelize", "training_step"]
