"""The page `report.html`: its pictures, its charts, its text."""
