"""What the report shows of each result, and the file that each result lies in."""
