"""Tokens out: draft trees, verification, sampling, caches, decode loop, Generator and server.

Imports only from `engines`, `export` and `drafter`.
"""
