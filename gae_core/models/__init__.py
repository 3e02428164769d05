"""The models, one file a topic: modules that know their loss and how to sample, and nothing of training."""
