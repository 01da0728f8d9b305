"""Reading and writing image files, the metadata in them, and previews."""
