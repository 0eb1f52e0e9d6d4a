"""What stands on the page of report.py: curves and samples."""
