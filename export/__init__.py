"""PyTorch to ONNX: the graph contract, written once as data, and the exporters that fulfil it.

Imports only from `drafter`.
"""
