"""Bytes and Parquet on any fsspec file system. Knows keys, digests and contracts' column names, never their meaning."""
