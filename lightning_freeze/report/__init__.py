"""Facts -> totals -> text, HTML, pictures."""
