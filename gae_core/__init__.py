"""Estimators, models and metrics of the book *Generative Autoencoders*, small enough to copy.

Floors, each importing only from the ones above it in this list:
``gaussian``, ``entropy``, ``normalization``, ``sampling``, ``nets``, ``data``; then ``models``;
then ``train``, ``metrics``, ``variational``, ``plots``; then ``experiments``.
"""

__version__ = "0.1.0"
