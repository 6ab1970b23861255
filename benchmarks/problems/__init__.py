"""What can be measured: one file for attention, one for operations on rows, one for whole models."""
