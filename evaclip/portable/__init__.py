"""Towers as ONNX files that carry the proof of what they compute."""
