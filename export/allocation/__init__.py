"""The compile-time plan: a type for each operator of a program, such that the model's output keeps a tolerance."""
