"""Sections of the report for each result, and the file that each result lies in."""
