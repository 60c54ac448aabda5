"""What commands print: tables that fit the terminal, and the last lines of a run."""
