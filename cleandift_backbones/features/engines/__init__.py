"""Engines of extraction: `local` computes in this process."""
