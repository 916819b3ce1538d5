"""The readers of sources, one room for each kind of file; data_pipeline/ingest.py is their door."""
