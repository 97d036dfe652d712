"""The recipes that ship with the package, as YAML files grouped by purpose."""
