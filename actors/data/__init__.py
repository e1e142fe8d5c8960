"""Data that ships with the package; see each oracle for provenance."""
