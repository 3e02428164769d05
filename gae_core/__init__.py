"""Estimators, models and metrics of the book *Generative Autoencoders*, small enough to copy.

A room imports from floors below its own alone. From the ground up:

- mathematics, each file of which can be copied alone: ``gaussian``, ``entropy``, ``normalization``, ``densities``,
  ``chains``, ``information``, ``energy``; beside them ``nets``, ``data``, ``text``, ``parallel``, ``seeds`` and
  ``training``;
- ``languages`` and ``models``, which know no training;
- ``train``; ``metrics``, what is measured; ``records``, what was; ``plots``;
- ``studies``: recipes, their runs and what is measured of them, all in ``studies.registry``; ``__main__`` runs them.
"""

__version__ = "0.1.0"
