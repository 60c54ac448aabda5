"""Files: strict readers, folders that list their content, results that appear whole or not."""
