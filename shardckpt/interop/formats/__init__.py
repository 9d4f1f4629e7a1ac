"""Files of other formats, one module a format. Imports `format` and below."""
