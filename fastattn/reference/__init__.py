"""The oracle: every operation in plain torch, float64-capable, differentiable by autograd to any order."""
