"""What one does with h, the skips and the verbs: one file a paper."""
