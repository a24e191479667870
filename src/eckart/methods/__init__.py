"""Published methods and our own, by verb; each is a page."""
