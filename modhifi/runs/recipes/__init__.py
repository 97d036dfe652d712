"""What a run is to do: recipes, as pydantic models and as files."""
