"""Entry point: chooses the module that trains, and imports it then."""

import importlib

importlib.import_module(".".join([__package__ or "titan", "train"])).main()
