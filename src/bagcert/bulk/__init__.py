"""Certification of whole data sources: folders, Parquet files, object stores."""
