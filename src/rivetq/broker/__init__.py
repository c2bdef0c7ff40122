"""The face: it checks what a caller gives, fills in defaults, and hands requests to an engine."""
