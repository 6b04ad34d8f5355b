"""One file a backend: its attention, its modules, its lowering."""
