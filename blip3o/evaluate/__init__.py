"""Evaluation: a judge that reads pixels, scores with intervals, and a report anyone can open."""
