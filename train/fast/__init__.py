"""The hand-written block and attention of training."""
