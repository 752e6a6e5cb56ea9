"""The text-to-image world that ships with the project: scenes of one or two coloured shapes."""
