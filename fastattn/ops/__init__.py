"""Operators: schema, fake, derivative and calling convention of each kernel, all made by `define.Operator`."""
