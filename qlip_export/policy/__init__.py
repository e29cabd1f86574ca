"""The policy: quality from the text embedding (T2Q), bits from quality (Q2B), compiled to a table."""
