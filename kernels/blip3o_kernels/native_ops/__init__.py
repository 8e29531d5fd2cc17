"""The way into the compiled libraries, one file per op: lays tensors out as csrc/blip3o.h wants them, and calls."""
