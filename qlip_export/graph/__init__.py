"""Passes over the captured graph: ingest, find layers, split, bind weights, Q/DQ, cast, expand."""
