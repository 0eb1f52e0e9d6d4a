"""What stands on the page of report.py: runs in words, tables, curves and samples."""
