"""Dynamic resource management: policies that decide while a machine changes, and its simulator.

An *observation* shows the last part of a run, an *action* is a change of the machine or the plan,
and a *policy* maps one to the other. Policies for operating points act on simulated machines only:
Partita never changes clocks, powers or governors of hardware. *Managers* act in a running training
(`contract`): they let it survive lost processes (`survival`), move work away from slow ones
(`balance`, by the times of `monitor`), and change its plan (`replanning`).

Contents: the settings of a machine with their speed and power (`hardware`), its heat (`heat`), a
training step as kernels and snippets (`program`, `workload`), the simulator (`power`), policies
(`policies/`), and the comparison of policies (`comparison`).
"""
