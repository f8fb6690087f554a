"""The verbs' definitions in plain torch, and the kernels that replace them."""
