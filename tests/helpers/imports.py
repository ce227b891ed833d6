"""Names that a module imports."""

import ast


def imports(source: str) -> list[str]:
    """Dotted names of all that is imported anywhere in the source; a leading dot marks a relative import."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names
