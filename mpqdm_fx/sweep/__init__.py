"""One walk over two lanes that quantizes every layer where it meets it."""
