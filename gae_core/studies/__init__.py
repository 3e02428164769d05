"""What the chapters measure in recorded runs: a file a topic, each with its ``STUDIES``."""
