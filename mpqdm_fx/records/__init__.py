"""What is asked, and what was decided: frozen records that are written down as JSON."""
